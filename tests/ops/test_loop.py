"""One loop of the layer as one step of autograd, and the one that computes again: against the loop written out."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ccnet_d2.ops import compiled, criss_cross_attention
from ccnet_d2.ops.loop import criss_cross_loop, supports_loop
from ccnet_d2.ops.recompute import recomputed_loops

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)

KEY_CHANNELS, CHANNELS = 3, 40  # chunks of 16, 16 and 8


def plain(x, weight, bias, gamma):
    return criss_cross_loop(x, weight, bias, gamma, KEY_CHANNELS)


def recomputed(x, weight, bias, gamma):
    return recomputed_loops(x, weight, bias, gamma, KEY_CHANNELS, chunks=3, backend="compiled")


def recomputed_by_products(x, weight, bias, gamma):
    return recomputed_loops(x, weight, bias, gamma, KEY_CHANNELS, chunks=3, backend="matmul")


def recomputed_by_the_reference(x, weight, bias, gamma):
    return recomputed_loops(x, weight, bias, gamma, KEY_CHANNELS, chunks=1, backend="reference")


COMPILED = [plain, recomputed]
ALL = [*COMPILED, recomputed_by_products, recomputed_by_the_reference]


def written_out(x, weight, bias, gamma):
    projected = torch.einsum("oc,bc...->bo...", weight, x) + bias.view(-1, *[1] * (x.dim() - 2))
    parts = projected.split([KEY_CHANNELS, KEY_CHANNELS, x.shape[1]], dim=1)
    return gamma * criss_cross_attention(*parts, backend="reference") + x


def draw(*sizes, batch=2, channels=CHANNELS, dtype=torch.float64, channels_last=False, gamma=0.7):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *sizes)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = 2 * KEY_CHANNELS + channels
    weight, bias = torch.randn(rows, channels) * channels**-0.5, torch.randn(rows)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias, torch.tensor([gamma]))]


def gradients(loop, inputs, grad):
    out = loop(*inputs)
    return out, torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad)


@pytest.mark.parametrize("loop", ALL)
@pytest.mark.parametrize("sizes", [(7,), (5, 6), (3, 4, 5), (1, 6)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("grad_last", [False, True])
def test_values_and_gradients(loop, sizes, batch, channels_last, grad_last):
    inputs = draw(*sizes, batch=batch, channels_last=channels_last)
    grad = draw(*sizes, batch=batch, channels_last=grad_last)[0].detach().flip(0, 1)
    if grad_last:
        grad = grad.movedim(1, -1).contiguous().movedim(-1, 1)
    out, got = gradients(loop, inputs, grad)
    wanted_out, wanted = gradients(written_out, inputs, grad)
    torch.testing.assert_close(out, wanted_out)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)
    if loop in COMPILED:
        assert out.stride() == inputs[0].stride()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("out_last", [False, True])
@pytest.mark.parametrize("grad_last", [False, True])
def test_the_layout_of_the_result_can_be_chosen(batch, dtype, x_last, out_last, grad_last):
    """The gradient of the input lies in memory like the input, whatever comes in."""
    inputs = draw(9, 11, batch=batch, channels_last=x_last, dtype=dtype)
    grad = draw(9, 11, batch=batch, channels_last=grad_last, dtype=dtype)[0].detach().flip(2)
    if grad_last:
        grad = grad.movedim(1, -1).contiguous().movedim(-1, 1)

    def loop(*inputs):
        return criss_cross_loop(*inputs, KEY_CHANNELS, channels_last=out_last)

    out, got = gradients(loop, inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted_out, wanted = gradients(written_out, exact, grad.double())
    unit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for g, w in zip((out, *got), (wanted_out, *wanted), strict=True):
        assert (g.double() - w).norm() <= unit * w.norm()
    like = draw(9, 11, batch=batch, channels_last=out_last, dtype=dtype)[0]
    assert out.stride() == like.stride() and got[0].stride() == inputs[0].stride()
    with torch.no_grad():
        assert torch.equal(loop(*inputs), out) and loop(*inputs).stride() == like.stride()


@pytest.mark.parametrize("loop", ALL)
def test_gradcheck(loop):
    assert torch.autograd.gradcheck(loop, draw(2, 3, batch=1, channels=20))


@pytest.mark.parametrize("loop", ALL)
def test_gamma_of_zero_learns(loop):
    inputs = draw(5, 6, gamma=0.0)
    out, got = gradients(loop, inputs, torch.ones_like(inputs[0]))
    assert torch.equal(out, inputs[0])
    wanted = gradients(written_out, inputs, torch.ones_like(inputs[0]))[1]
    assert wanted[3].abs() > 1e-3
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("loop", ALL)
def test_odd_inputs_and_gradients(loop):
    """A slice of a map, a transposed one, and the gradient of a sum, which is one number seen everywhere."""
    x, *rest = draw(6, 6)
    for view in (x[:, :, 1:, ::2], x.transpose(2, 3)):
        leaf = view.detach().requires_grad_()
        assert not leaf.is_contiguous()
        got = torch.autograd.grad(loop(leaf, *rest).sum(), [leaf, *rest])
        wanted = torch.autograd.grad(written_out(leaf, *rest).sum(), [leaf, *rest])
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("loop", ALL)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2)])
def test_frozen_inputs(loop, frozen):
    inputs = draw(5, 6)
    wanted = gradients(written_out, inputs, torch.ones_like(inputs[0]))[1]
    for i in frozen:
        inputs[i].requires_grad_(False)
    got = gradients(loop, inputs, torch.ones_like(inputs[0]))[1]
    for g, w in zip(got, [w for i, w in enumerate(wanted) if i not in frozen], strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("loop", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(loop, dtype, autocast):
    """As far from fp64 as the loop written out in that dtype at most, with some room for chance."""
    low = torch.bfloat16 if autocast else dtype
    inputs = draw(9, 11, dtype=torch.float32)
    if not autocast:
        inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    grad = torch.randn(inputs[0].shape).to(inputs[0].dtype)

    def run(function):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = function(*inputs)
        return out, torch.autograd.grad(out, inputs, grad.to(out.dtype))

    out, got = run(loop)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted_out, wanted = gradients(written_out, exact, grad.double())
    unit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[low]
    assert out.dtype == inputs[0].dtype
    for x, g, w in zip([None, *inputs], (out, *got), (wanted_out, *wanted), strict=True):
        assert x is None or g.dtype == x.dtype
        assert (g.double() - w).norm() <= unit * w.norm(), (g.double() - w).norm() / w.norm()


@pytest.mark.parametrize("loop", ALL)
def test_backward_pass_inside_autocast_after_a_forward_pass_outside(loop):
    inputs = draw(9, 11, dtype=torch.float32)
    out = loop(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(out, inputs, torch.ones_like(out))
    wanted = gradients(written_out, inputs, torch.ones_like(out))[1]
    for t, g, w in zip(inputs, got, wanted, strict=True):
        assert g.dtype == t.dtype
        assert (g - w).norm() <= 2e-6 * w.norm()


@pytest.mark.parametrize("loop", ALL)
def test_twice_through_one_graph(loop):
    inputs = draw(5, 6)
    out = loop(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loop", ALL)
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("loss", [torch.sum, torch.linalg.vector_norm])
def test_second_derivative_is_refused(loop, wanted, batch, loss):
    inputs = draw(4, 5, batch=batch)
    (grad,) = torch.autograd.grad(loss(loop(*inputs)), inputs[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("loop", ALL)
def test_batches_of_gradients_are_refused(loop):
    inputs = draw(4, 5)
    out = loop(*inputs)
    with pytest.raises(
        RuntimeError, match=r"one gradient at a time.*use backend='matmul' and recompute=False"
    ):
        torch.autograd.grad(out, inputs, torch.randn(3, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("loop", COMPILED)
def test_compile_is_one_graph_with_gradients(loop):
    inputs = draw(6, 5, dtype=torch.float32)
    grad = torch.randn_like(inputs[0])
    function = torch.compile(loop, fullgraph=True)
    out, got = gradients(function, inputs, grad)
    wanted_out, wanted = gradients(loop, inputs, grad)
    torch.testing.assert_close(out, wanted_out)
    for g, w in zip(
        got, wanted, strict=True
    ):  # the gradient of the key's bias is zero, of which rounding is left
        assert (g - w).norm() <= 2e-6 * w.norm()


@pytest.mark.parametrize("loop", COMPILED)
def test_compile_asks_torch_nothing_that_ends_a_graph_of_torch_2_10(loop, monkeypatch):
    outside = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", outside)
    inputs = draw(6, 5, dtype=torch.float32)
    out = torch.compile(loop, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(out, loop(*inputs))


@pytest.mark.parametrize("loop", COMPILED)
@pytest.mark.parametrize("train", [False, True])
def test_export_takes_other_image_sizes(loop, train):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rest = torch.nn.ParameterList(draw(1, 1, dtype=torch.float32)[1:]).requires_grad_(train)

        def forward(self, x):
            return loop(x, *self.rest)

    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    module, x = Module(), torch.randn(1, CHANNELS, 6, 5)
    program = torch.export.export(module, (x,), dynamic_shapes=({2: height, 3: width},))
    assert any("criss_cross_packed_forward" in str(node.target) for node in program.graph.nodes)
    other = torch.randn(1, CHANNELS, 9, 13)
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("loop", ALL)
def test_checkpointing_computes_the_same(loop):
    inputs = draw(6, 5, dtype=torch.float32)
    wanted = torch.autograd.grad(loop(*inputs).square().sum(), inputs)
    for reentrant in (False, True):
        out = checkpoint(loop, *inputs, use_reentrant=reentrant)
        out.square().sum().backward()
        for t, w in zip(inputs, wanted, strict=True):
            assert torch.equal(t.grad, w)
            t.grad = None


def kept_bytes(loop, inputs):
    """Of the tensors that the graph keeps, beside the inputs."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = loop(*inputs)
    own.add(out.untyped_storage().data_ptr())
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept_for_the_backward_pass(autocast):
    inputs = draw(6, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        # Projection and attended map, and the log-sum-exps in fp32
        numbers, size = 2 * 6 * 5 * (2 * KEY_CHANNELS + 2 * CHANNELS), 2 if autocast else 4
        assert kept_bytes(plain, inputs) == numbers * size + 2 * 6 * 5 * 4
        for loop in (recomputed, recomputed_by_products, recomputed_by_the_reference):
            assert kept_bytes(loop, inputs) == 0
    with torch.no_grad():
        assert not any(loop(*inputs).requires_grad for loop in ALL)


def test_what_the_loop_is_for():
    x, weight, *rest = draw(5, 6, dtype=torch.float32)

    def supported(x, weight, backend="auto"):
        return supports_loop(x, weight, *rest, backend)

    assert supported(x, weight) and supported(x, weight, "compiled")
    assert not supported(x, weight, "matmul") and not supported(x, weight, "reference")
    assert not supported(x.to("meta"), weight.to("meta"))
    assert not supported(x, weight.double())  # an error, which the layer's own product raises
    assert not supported(x[:, :, :0], weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert supported(x, weight) and supported(x.bfloat16(), weight)
        assert not supported(x.half(), weight)
    with forward_ad.dual_level():  # tangents would be lost
        assert not supported(forward_ad.make_dual(x, x), weight)
        assert not supported(x, forward_ad.make_dual(weight, weight))
    assert supported(x, weight)


def test_what_cannot_be_recomputed_is_named():
    x, weight, bias, gamma = draw(5, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match="outside autocast x and the weights must have one dtype"):
        recomputed(x, weight.double(), bias, gamma)
    with pytest.raises(RuntimeError, match=r"backend='compiled' cannot run: .* not on 'meta'"):
        recomputed(*(t.to("meta") for t in (x, weight, bias, gamma)))
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        recomputed_loops(x, weight, bias, gamma, KEY_CHANNELS, chunks=2, backend="fast")
