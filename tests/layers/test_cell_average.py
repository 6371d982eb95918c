"""Averages over cells: those of torch's pool, also compiled, and then for maps of any size."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ccnet_d2.layers.cell_average import average_by_products, cell_average


@pytest.mark.parametrize(
    ("size", "bins"), [((7, 5), (3, 2)), ((12, 12), (6, 6)), ((4, 9), (6, 3)), ((3, 8), (1, 8))]
)
def test_products_are_the_pool(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(average_by_products(x, bins), F.adaptive_avg_pool2d(x, bins))


def test_products_are_exact_inside_autocast_and_in_half_precision():
    x = 100 + torch.rand(1, 2, 97, 61)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(average_by_products(x, (3, 3)), F.adaptive_avg_pool2d(x, 3))
    half = torch.randn(1, 2, 97, 61).bfloat16()
    rounded = F.adaptive_avg_pool2d(half.double(), 3).bfloat16()
    torch.testing.assert_close(average_by_products(half, (3, 3)), rounded, atol=0, rtol=0)


def test_compiled_it_has_no_pool_that_is_for_one_size():
    targets = set()

    def keep(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(cell_average, backend=keep, dynamic=True, fullgraph=True)
    for size in [(9, 12), (12, 10), (5, 7)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x, 6), F.adaptive_avg_pool2d(x, 6))
    assert counters["stats"]["unique_graphs"] == 1
    assert targets and not any("adaptive" in target for target in targets)
    torch._dynamo.reset()
