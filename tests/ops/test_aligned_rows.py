"""Products that a GPU makes of a loop read rows that begin at multiples of 16 bytes.

Shapes and strides are those on a GPU, values are computed on the CPU.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ccnet_d2.ops import aligned_rows, compiled
from ccnet_d2.ops.aligned_rows import has_aligned_rows, with_aligned_rows
from ccnet_d2.ops.loop import criss_cross_loop, projection_gradients
from ccnet_d2.ops.projection import add_input_gradient, project, weight_gradient
from ccnet_d2.ops.recompute import recomputed_loops

KEY_CHANNELS, CHANNELS = 8, 32
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}

needs_operators = pytest.mark.skipif(not compiled.is_available(), reason=str(compiled.unavailable_reason()))


def draw(batch, sizes, *, device="cpu", dtype=torch.float64, channels_last=False):
    x = torch.randn(batch, CHANNELS, *sizes).to(dtype).to(device)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def draw_parameters(*, device="cpu", dtype=torch.float64):
    rows = 2 * KEY_CHANNELS + CHANNELS
    weight = torch.randn(rows, CHANNELS) * CHANNELS**-0.5
    return [t.to(dtype).to(device) for t in (weight, torch.randn(rows), torch.tensor([0.7]))]


@pytest.fixture
def gpu(monkeypatch):
    """As if the compiled library for GPUs were there."""
    monkeypatch.setattr(compiled, "supports", lambda *inputs: None)


class Products(TorchDispatchMode):
    """What is multiplied with what."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in PRODUCTS:
            tensors = [*args, *(kwargs or {}).values()]
            self.operands.append([t for t in tensors if isinstance(t, torch.Tensor) and t.dim() >= 2])
        return function(*args, **(kwargs or {}))

    def are_aligned(self):
        return all(rows_are_aligned(t) for operands in self.operands for t in operands)


def rows_are_aligned(matrix):
    distances = [s for s, n in zip(matrix.stride()[-2:], matrix.shape[-2:], strict=True) if n > 1]
    return 1 in distances and all(s == 1 or s * matrix.itemsize % 16 == 0 for s in distances)


@needs_operators
@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "aligned"),
    [
        ("cuda", torch.bfloat16, (97, 97), False),
        ("cuda", torch.float16, (90, 90), False),
        ("cuda", torch.float16, (5, 9, 8), True),
        ("cuda", torch.bfloat16, (64, 64), True),
        ("cuda", torch.float32, (97, 97), True),
        ("cpu", torch.bfloat16, (97, 97), True),
    ],
)
def test_copies_what_the_gpu_would_not_read_fast(gpu, device, dtype, sizes, aligned):
    with FakeTensorMode():
        x = draw(2, sizes, device=device, dtype=dtype)
        read = with_aligned_rows(x)
        assert has_aligned_rows(x) == aligned == (read is x)
        assert has_aligned_rows(read)
        last = draw(2, sizes, device=device, dtype=dtype, channels_last=True)
        assert with_aligned_rows(last) is last


@needs_operators
@pytest.mark.parametrize("sizes", [(9, 11), (6, 6), (8, 8), (3, 5, 7)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_a_loop_on_a_gpu(gpu, sizes, batch, x_last, grad_last, dtype):
    with FakeTensorMode(), Products() as products, torch.no_grad():
        x = draw(batch, sizes, device="cuda", dtype=dtype, channels_last=x_last)
        grad = draw(batch, sizes, device="cuda", dtype=dtype, channels_last=grad_last)
        weight, bias, gamma = draw_parameters(device="cuda", dtype=dtype)
        criss_cross_loop(x, weight, bias, gamma, KEY_CHANNELS)
        # The backward pass without autograd, which wants a GPU.
        grads = project(x, weight, bias)
        got = projection_gradients((True, True, True), grad, grads, x, weight, dtype)
        assert [g.shape for g in got] == [x.shape, weight.shape, bias.shape]
    assert len(products.operands) >= 4
    assert products.are_aligned()


def test_the_test_sees_products_that_are_not_aligned(monkeypatch):
    monkeypatch.setattr(aligned_rows, "_pays_to_copy", lambda x: False)
    with FakeTensorMode(), Products() as products:
        x = draw(1, (9, 11), device="cuda", dtype=torch.float16)
        project(x, *draw_parameters(device="cuda", dtype=torch.float16)[:2])
    assert len(products.operands) == 1 and not products.are_aligned()


@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_take_any_size(batch):
    """A graph that was recorded with one number of positions is not made anew for another."""
    weight, bias, _ = draw_parameters()
    graphs = CompileCounter()
    torch._dynamo.reset()
    call = torch.compile(project, backend=graphs, dynamic=True, fullgraph=True)
    for sizes in ((9, 11), (8, 16), (7, 7)):
        x = draw(batch, sizes)
        torch.testing.assert_close(call(x, weight, bias), project(x, weight, bias))
    assert graphs.frame_count == 1


@needs_operators
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [(9, 11), (3, 5, 7), (4, 6)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("channels_last", [None, False, True])
def test_values_by_way_of_copies(recompute, sizes, batch, grad_last, channels_last, monkeypatch):
    """As on a GPU, where values cannot be tried here, so on a CPU: odd numbers of positions are copied."""
    torch.manual_seed(0)
    x, grad = draw(batch, sizes), draw(batch, sizes, channels_last=grad_last)
    inputs = [t.requires_grad_() for t in (x, *draw_parameters())]

    def run():
        if recompute:
            out = recomputed_loops(*inputs, KEY_CHANNELS, chunks=2, backend="compiled")
        else:
            out = criss_cross_loop(*inputs, KEY_CHANNELS, channels_last=channels_last)
        with torch.no_grad():
            again = criss_cross_loop(*inputs, KEY_CHANNELS, channels_last=channels_last)
        return out, again, *torch.autograd.grad(out, inputs, grad)

    wanted = run()
    copies = []
    monkeypatch.setattr(aligned_rows, "_pays_to_copy", lambda x: True)
    copy = aligned_rows.to_channels_last
    monkeypatch.setattr(aligned_rows, "to_channels_last", lambda x: copies.append(x) or copy(x))
    got = run()
    assert bool(copies) == (x.shape[2:].numel() % 2 == 1)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)
    assert [g.stride() for g in got[:2]] == [w.stride() for w in wanted[:2]]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_off_the_cpu(batch, channels_last):
    """On GPUs they are formed without copies of the weight: here as far as their shapes and places in memory go."""
    with FakeTensorMode(), Products() as products:
        x = draw(batch, (8, 8), device="cuda", dtype=torch.float16, channels_last=channels_last)
        weight, bias, _ = draw_parameters(device="cuda", dtype=torch.float16)
        grads = project(x, weight, bias)
        of_weight = weight_gradient(grads, x)
        assert of_weight.shape == weight.shape and of_weight.is_contiguous()
        add_input_gradient(x, grads, weight)
    own = [t for operands in products.operands for t in operands]
    assert sum(t.untyped_storage() is weight.untyped_storage() for t in own) == 2


def test_without_the_library_for_gpus_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(compiled, "supports", lambda *inputs: "it is not there.")
    with FakeTensorMode():
        x = draw(2, (97, 97), device="cuda", dtype=torch.bfloat16)
        assert has_aligned_rows(x) and with_aligned_rows(x) is x
