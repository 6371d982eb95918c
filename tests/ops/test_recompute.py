"""Loops that keep little for the backward pass: against the same loops written out, and what they hold."""

import pytest
import torch
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from ccnet_d2.ops import compiled, criss_cross_attention
from ccnet_d2.ops.recompute import recomputed_loops

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)

KEY_CHANNELS, CHANNELS = 3, 72
BACKENDS = ["compiled", "matmul", "reference"]


def draw(*sizes, dtype=torch.float64, channels_last=False, gamma=0.7):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 2, CHANNELS, *sizes)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = 2 * KEY_CHANNELS + CHANNELS
    weight, bias = torch.randn(rows, CHANNELS) * CHANNELS**-0.5, torch.randn(rows)
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias, torch.tensor([gamma]))]
    return inputs, grad.to(dtype)


def written_out(x, weight, bias, gamma, loops):
    for _ in range(loops):
        projected = torch.einsum("oc,bc...->bo...", weight, x) + bias.view(-1, *[1] * (x.dim() - 2))
        parts = projected.split([KEY_CHANNELS, KEY_CHANNELS, x.shape[1]], dim=1)
        x = gamma * criss_cross_attention(*parts, backend="reference") + x
    return x


def recomputed(*inputs, loops, chunks=5, backend="compiled"):
    return recomputed_loops(*inputs, KEY_CHANNELS, loops=loops, chunks=chunks, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_values_and_gradients(backend, sizes, channels_last, loops, chunks):
    inputs, grad = draw(*sizes, channels_last=channels_last)
    out = recomputed(*inputs, loops=loops, chunks=chunks, backend=backend)
    wanted = written_out(*inputs, loops)
    torch.testing.assert_close(out, wanted)
    got = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, inputs, grad))
    assert out.stride() == inputs[0].stride()
    if backend == "compiled":
        assert got[0].stride() == inputs[0].stride()


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_memory_with_two_uses_changes_nothing(loops, dtype, monkeypatch):
    """The CUDA kernels are given none."""
    inputs, grad = draw(5, 6, dtype=dtype)
    results = []
    for reused in (True, False):
        if not reused:
            monkeypatch.setattr(compiled, "reuses_memory", lambda x: False)
        out = recomputed(*inputs, loops=loops)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    unit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]  # sums in another order
    for one, other in zip(*results, strict=True):
        assert (one.double() - other.double()).norm() <= unit * other.double().norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2), (1, 2, 3)])
@pytest.mark.parametrize("loops", [2, 3])
def test_frozen_inputs(backend, frozen, loops):
    inputs, grad = draw(5, 6)
    trained = [t.requires_grad_(i not in frozen) for i, t in enumerate(inputs) if i not in frozen]
    for i in frozen:
        inputs[i].requires_grad_(False)
    got = torch.autograd.grad(recomputed(*inputs, loops=loops, backend=backend), trained, grad)
    torch.testing.assert_close(got, torch.autograd.grad(written_out(*inputs, loops), trained, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(dtype, autocast, backend):
    low = torch.bfloat16 if autocast else dtype
    inputs, grad = draw(9, 11, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = recomputed(*inputs, loops=2, backend=backend)
    got = (out, *torch.autograd.grad(out, inputs, grad))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted_out = written_out(*exact, 2)
    wanted = (wanted_out, *torch.autograd.grad(wanted_out, exact, grad.double()))
    unit = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[low]
    for like, value, expected in zip((inputs[0], *inputs), got, wanted, strict=True):
        assert value.dtype == like.dtype
        assert (value.double() - expected).norm() <= unit * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_backward_pass_changes_nothing(backend):
    inputs, grad = draw(9, 11, dtype=torch.float32)
    out = recomputed(*inputs, loops=2, backend=backend)
    wanted = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(out, inputs, grad)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("backend", ["compiled", "matmul"])
def test_many_chunks_are_as_exact_as_one_in_half_precision(backend):
    """The gradients of query and key are sums over them."""
    channels = 1024
    rows = 2 * KEY_CHANNELS + channels
    torch.manual_seed(0)
    shapes = (1, channels, 6, 7), (rows, channels), (rows,)
    inputs = [torch.randn(shape) * scale for shape, scale in zip(shapes, (1, channels**-0.5, 1), strict=True)]
    inputs = [t.bfloat16().requires_grad_() for t in (*inputs, torch.tensor([0.7]))]
    grad = torch.randn(shapes[0]).bfloat16()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(written_out(*exact, 1), exact[1], grad.double())[0][: 2 * KEY_CHANNELS]
    errors = []
    for chunks in (1, 64):
        out = recomputed(*inputs, loops=1, chunks=chunks, backend=backend)
        (got,) = torch.autograd.grad(out, inputs[1], grad)
        errors.append((got[: 2 * KEY_CHANNELS].double() - wanted).norm())
    assert errors[1] < 1.15 * errors[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_twice_through_one_graph(backend, loops):
    """The first time the maps between the loops are written over."""
    inputs, grad = draw(5, 6)
    out = recomputed(*inputs, loops=loops, backend=backend)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(out, inputs, grad)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_what_is_kept_can_be_kept_elsewhere(loops):
    """By hooks, as those of checkpoint and save_on_cpu; each tensor is asked for once in a backward pass."""
    inputs, grad = draw(5, 6)
    wanted = torch.autograd.grad(recomputed(*inputs, loops=loops), inputs, grad)
    asked = []

    def give(kept):
        asked.append(kept.shape)
        return kept.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), give):
        out = recomputed(*inputs, loops=loops)
    for last in (False, True):
        asked.clear()
        got = torch.autograd.grad(out, inputs, grad, retain_graph=not last)
        assert all(map(torch.equal, got, wanted))
        assert asked == [t.shape for t in inputs] + [inputs[0].shape] * (loops - 1)


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same(loops, reentrant):
    inputs, grad = draw(5, 6)
    wanted = torch.autograd.grad(recomputed(*inputs, loops=loops), inputs, grad)
    out = checkpoint(lambda *t: recomputed(*t, loops=loops), *inputs, use_reentrant=reentrant)
    out.backward(grad)
    assert all(map(torch.equal, [t.grad for t in inputs], wanted))


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_that_is_given_is_written_over(loops, channels_last):
    inputs, grad = draw(5, 6, channels_last=channels_last)
    out = recomputed(*inputs, loops=loops)
    given = [*inputs, grad, out]
    before = [t.detach().clone() for t in given]
    torch.autograd.grad(out, inputs, grad)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loops", [1, 2])
def test_maps_with_gaps(loops, backend):
    """Those of a slice; and of `out.sum()`, whose gradient is one number everywhere."""
    inputs, grad = draw(5, 6)
    sliced = torch.stack([inputs[0].detach(), grad], dim=-1)[..., 0].requires_grad_()
    for x, grads in ((sliced, grad), (inputs[0], torch.ones(()).double().expand_as(grad))):
        given = [x, *inputs[1:]]
        out, wanted = recomputed(*given, loops=loops, backend=backend), written_out(*given, loops)
        torch.testing.assert_close(out, wanted)
        got = torch.autograd.grad(out, given, grads)
        torch.testing.assert_close(got, torch.autograd.grad(wanted, given, grads))


@pytest.mark.parametrize("loops", [1, 2])
def test_gradcheck(loops):
    inputs, _ = draw(2, 3)
    inputs = [inputs[0][:1, :16].detach(), inputs[1][:22, :16].detach(), inputs[2][:22].detach(), inputs[3]]
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: recomputed(*t, loops=loops, chunks=1), inputs)


@pytest.mark.parametrize("wanted", range(4))
def test_second_derivative_is_refused(wanted):
    inputs, _ = draw(4, 5)
    loss = recomputed(*inputs, loops=2).square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def peak_bytes(run):
    """The most bytes of tensors that are allocated at a time while it runs."""
    with profile(profile_memory=True) as recorded:
        result = run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del result
    return most


class Next(torch.autograd.Function):
    """What comes after the layer in a network: it does not hold the layer's output in the backward pass."""

    @staticmethod
    def forward(ctx, out, grad):
        ctx.save_for_backward(grad)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_training_step_holds(dtype, channels_last, frozen):
    """One map between the loops, the projection's gradient, query and key, and maps of one chunk."""
    channels, key_channels, sizes = 512, 64, (24, 24)
    torch.manual_seed(0)
    x, grad = torch.randn(2, 1, channels, *sizes, dtype=dtype)
    if channels_last:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    rows = 2 * key_channels + channels
    weight, bias = torch.randn(rows, channels, dtype=dtype) / 16, torch.randn(rows, dtype=dtype)
    inputs = x, weight, bias, torch.tensor([0.7], dtype=dtype)
    trained = [t.requires_grad_() for t in (inputs[:1] if frozen else inputs)]

    def step(chunks):
        out = recomputed_loops(*inputs, key_channels, loops=2, chunks=chunks, backend="compiled")
        loss = Next.apply(out, grad)
        del out
        return torch.autograd.grad(loss, trained)

    number = dtype.itemsize
    positions = sizes[0] * sizes[1]
    if frozen:
        beside = (
            (2 + 16) * positions * number
        )  # two numbers of each position's softmax; a multiple of 16 channels
    else:
        beside = 3 * rows * (channels + 1) * number  # the weights' gradients of both loops, and their sum
    for chunks, largest in ((1, 2 * channels), (2, channels), (3, 256), (5, 128), (8, 80)):
        step(chunks)
        maps = channels + (2 * key_channels + channels) + 2 * key_channels + largest
        assert peak_bytes(lambda chunks=chunks: step(chunks)) <= maps * positions * number + beside
