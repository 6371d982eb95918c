"""What torch asks of an operator: schema, fake kernel, autograd, compilation, export, autocast, FLOPs."""

import pytest
import torch
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from ccnet_d2.ops import compiled, criss_cross_attention

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)


def attend(query, key, value):
    return criss_cross_attention(query, key, value, backend="compiled")


def draw(*sizes, requires_grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, *sizes, generator=generator).to(dtype).requires_grad_(requires_grad)
        for c in (4, 4, 6)
    ]


@pytest.mark.parametrize("sizes", [(7,), (5, 6), (3, 4, 5), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(sizes, dtype):
    inputs = draw(*sizes, requires_grad=True, dtype=dtype)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_forward, inputs)
    plain = [x.detach() for x in inputs]
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(*plain)
    library.opcheck(torch.ops.ccnet_d2.criss_cross_backward, [out, *plain, out, lse])


def test_opcheck_of_other_strides():
    inputs = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in draw(5, 6)]
    library.opcheck(torch.ops.ccnet_d2.criss_cross_forward, inputs)


def test_compile_is_one_graph_with_gradients():
    inputs = draw(6, 5, requires_grad=True)
    function = torch.compile(lambda q, k, v: attend(q, k, v).square(), fullgraph=True)
    got, wanted = function(*inputs), attend(*inputs).square()
    torch.testing.assert_close(got, wanted)
    for g, w in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_export_takes_other_image_sizes():
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value) + 1

    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    dynamic = {2: height, 3: width}
    program = torch.export.export(Module(), tuple(draw(6, 5)), dynamic_shapes=(dynamic, dynamic, dynamic))
    assert any("criss_cross_forward" in str(node.target) for node in program.graph.nodes)
    other = draw(9, 13)
    torch.testing.assert_close(program.module()(*other), Module()(*other))


def test_second_derivative_is_refused():
    query, key, value = draw(4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def test_checkpointing_recomputes_the_same():
    inputs = draw(6, 5, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    wanted = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    for g, w in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype_alone(dtype):
    inputs = draw(5, 6, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs)
        other = criss_cross_attention(*inputs, backend="matmul")
    assert out.dtype == other.dtype == dtype
    out.sum().backward()
    assert inputs[0].grad.dtype == dtype


def test_flops_are_counted():
    inputs = draw(5, 7, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attend(*inputs).sum().backward()
    pairs = 2 * 5 * 7 * (5 + 7)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["ccnet_d2.criss_cross_forward"] == 2 * pairs * (4 + 6)
    assert counts["ccnet_d2.criss_cross_backward"] == 2 * pairs * (3 * 4 + 2 * 6)


def test_unused_output_of_a_no_grad_run_keeps_nothing():
    inputs = draw(5, 6, requires_grad=True)
    with torch.no_grad():
        assert not attend(*inputs).requires_grad


def test_nchw_inputs_are_copied_once_for_both_passes():
    query, key = (torch.randn(2, 4, 5, 6, requires_grad=True) for _ in range(2))
    value = torch.randn(2, 7, 5, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = criss_cross_attention(query, key, value, backend="compiled")
    assert len(kept) == 5  # with the output and the statistic
    assert all(x.movedim(1, -1).is_contiguous() for x in kept if x.dim() == 4)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    wanted = criss_cross_attention(query.double(), key.double(), value.double(), backend="reference")
    for got, exact in zip(
        grads, torch.autograd.grad(wanted.square().sum(), (query, key, value)), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
