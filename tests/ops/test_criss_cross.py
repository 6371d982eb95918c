"""The op against a dense oracle built from an explicit neighbour mask, in float64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ccnet_d2.ops import available_backends, compiled, criss_cross_attention, criss_cross_weights
from ccnet_d2.ops.backends import automatic_backend, automatic_backend_on
from ccnet_d2.ops.loop import supports_loop
from ccnet_d2.ops.recompute import recomputed_loops

SIZES = [(5,), (1,), (4, 6), (1, 6), (6, 1), (7, 7), (3, 4, 5), (1, 4, 5), (3, 1, 1), (1, 1, 1)]
BACKENDS = [name for name, reason in available_backends().items() if reason is None]
DTYPE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def dense_weights(query, key):
    """(B, N, N) attention over all positions, those off the cross masked out one by one."""
    sizes = query.shape[2:]
    q, k = query.double().flatten(2), key.double().flatten(2)
    positions = list(itertools.product(*(range(size) for size in sizes)))
    mask = torch.tensor(
        [[sum(a != b for a, b in zip(p, o, strict=True)) <= 1 for o in positions] for p in positions]
    )
    energy = (q.transpose(1, 2) @ k).masked_fill(~mask, float("-inf"))
    return energy.softmax(-1)


def dense_attention(query, key, value):
    weights = dense_weights(query, key)
    return (value.double().flatten(2) @ weights.transpose(1, 2)).reshape(value.shape)


def draw(sizes, batch=2, key_channels=3, channels=5, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, key_channels, *sizes)] * 2 + [(batch, channels, *sizes)]
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPE_TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_equal_dense_oracle(backend, dtype, sizes):
    inputs = draw(sizes, dtype=dtype)
    out = criss_cross_attention(*inputs, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense_attention(*exact_inputs)
    tolerance = DTYPE_TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(exact, exact_inputs, grad.double())
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_attends_to_itself_once(backend):
    query, key, value = draw((1, 1))
    torch.testing.assert_close(criss_cross_attention(query, key, value, backend=backend), value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(4, 6), (3, 4, 5)])
def test_number_of_keys(backend, sizes):
    """With equal energies every key has the weight 1 / (number of keys): H+W-1 in 2D, T+H+W-2 in 3D."""
    query = torch.zeros(1, 2, *sizes)
    value = torch.zeros(1, 1, *sizes)
    value[(0, 0, *(0 for _ in sizes))] = 1.0
    out = criss_cross_attention(query, query, value, backend=backend)
    keys = sum(sizes) - len(sizes) + 1
    assert out[(0, 0, *(0 for _ in sizes))].item() == pytest.approx(1 / keys)
    assert (out > 0).sum() == keys


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [1e5, -1e5])
def test_huge_energies_stay_finite(backend, logit):
    query, key, value = draw((5, 6), dtype=torch.float32)
    query = (query * abs(logit)).detach().requires_grad_()
    key = (key * (1 if logit > 0 else -1)).detach().requires_grad_()
    out = criss_cross_attention(query, key, value, backend=backend)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(torch.isfinite(x).all() for x in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_energies_in_float32(backend, dtype):
    # Energies of 1e5 and more overflow fp16; the softmax must still find the largest.
    query, key, value = draw((6, 5), key_channels=64, dtype=dtype, scale=100.0)
    out = criss_cross_attention(query, key, value, backend=backend)
    exact = dense_attention(query, key, value)
    assert out.dtype == dtype
    assert ((out.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_energies_in_float32(backend):
    query, key, value = draw((6, 5), key_channels=64, dtype=torch.float32, scale=40.0)
    wanted = criss_cross_attention(query, key, value, backend=backend)
    with torch.autocast("cpu", dtype=torch.float16):
        got = criss_cross_attention(query, key, value, backend=backend)
        weights = criss_cross_weights(query, key)
    torch.testing.assert_close(got, wanted)
    for got_weights, wanted_weights in zip(weights, criss_cross_weights(query, key), strict=True):
        torch.testing.assert_close(got_weights, wanted_weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(5,), (4, 6), (1, 6), (3, 4, 5)])
def test_batch_of_no_image(backend, sizes):
    inputs = draw(sizes, batch=0)
    out = criss_cross_attention(*inputs, backend=backend)
    assert out.shape == (0, 5, *sizes)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("backend", ["auto", "matmul", "reference"])
def test_shapes_without_data(backend):
    inputs = [x.detach().to("meta").requires_grad_() for x in draw((4, 6), dtype=torch.float32)]
    out = criss_cross_attention(*inputs, backend=backend)
    assert out.is_meta and out.shape == (2, 5, 4, 6)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    query, key, value = (x.detach() for x in draw((6, 8)))
    expected = criss_cross_attention(query, key, value, backend=backend)
    channels_last = [x.to(memory_format=torch.channels_last) for x in (query, key, value)]
    torch.testing.assert_close(criss_cross_attention(*channels_last, backend=backend), expected)
    sliced = [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in (query, key, value)]
    torch.testing.assert_close(criss_cross_attention(*sliced, backend=backend), expected)
    expanded = [x[:1].expand_as(x) for x in (query, key, value)]
    copied = [x.clone(memory_format=torch.contiguous_format) for x in expanded]
    torch.testing.assert_close(
        criss_cross_attention(*expanded, backend=backend), criss_cross_attention(*copied, backend=backend)
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_weights_are_the_dense_weights(sizes):
    query, key, _ = (x.detach() for x in draw(sizes))
    dense = dense_weights(query, key).reshape(query.shape[0], *sizes, *sizes)
    weights = criss_cross_weights(query, key)
    torch.testing.assert_close(sum(w.sum(-1) for w in weights), torch.ones(2, *sizes, dtype=torch.float64))
    for position in itertools.product(*(range(size) for size in sizes)):
        for axis, axis_weights in enumerate(weights):
            line = dense[(slice(None), *position)]
            for other in reversed([a for a in range(len(sizes)) if a != axis]):
                line = line.select(other + 1, position[other])
            expected = line.clone()
            if axis != len(sizes) - 1:
                expected[:, position[axis]] = 0
            torch.testing.assert_close(axis_weights[(slice(None), *position)], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    assert torch.autograd.gradcheck(
        lambda *x: criss_cross_attention(*x, backend=backend), draw((3, 4), batch=1), fast_mode=True
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (2, 3), (2, 3)], "spatial axes"),
        ([(2, 3, 4, 4), (2, 3, 4, 5), (2, 3, 4, 4)], "key must have the shape of query"),
        ([(2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 5, 4)], "value must have the batch and spatial sizes"),
        ([(2, 3, 0, 4), (2, 3, 0, 4), (2, 3, 0, 4)], "at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        criss_cross_attention(*(torch.zeros(shape) for shape in shapes))


def test_mixed_dtypes_and_unknown_backends_are_refused():
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="one floating dtype"):
        criss_cross_attention(x, x, x.double())
    with pytest.raises(ValueError, match="one floating dtype"):
        criss_cross_attention(x.long(), x.long(), x.long())
    with pytest.raises(ValueError, match="one floating dtype"):
        criss_cross_attention(*(x.to(torch.float8_e4m3fn) for _ in range(3)))
    with pytest.raises(ValueError, match="one floating dtype"):
        criss_cross_attention(x.to("meta"), x.to("meta"), x.to("meta").double())
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        criss_cross_attention(x, x, x, backend="fast")
    with pytest.raises(RuntimeError, match=r"^backend='compiled' cannot run: the compiled operator"):
        criss_cross_attention(x.to("meta"), x.to("meta"), x.to("meta"), backend="compiled")


def use_gpu(monkeypatch, major, minor):
    """As if tensors were on a GPU of this compute capability."""
    gpu = SimpleNamespace(name="Tesla", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


@pytest.mark.parametrize(
    ("capability", "precision", "backend"),
    [
        ((9, 0), "none", "compiled"),
        ((9, 0), "ieee", "compiled"),
        ((9, 0), "tf32", "matmul"),
        ((8, 0), "none", "matmul"),
        ((10, 0), "none", "matmul"),
    ],
)
def test_auto_in_fp32_on_a_gpu_is_compiled_where_that_was_measured(
    monkeypatch, capability, precision, backend
):
    monkeypatch.setattr(compiled, "_CUDA_REASON", None)
    use_gpu(monkeypatch, *capability)
    products = SimpleNamespace(fp32_precision=precision)  # the real ones cannot be set back to what they were
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    assert automatic_backend_on("cuda", torch.float32) == backend
    assert automatic_backend_on("cuda", torch.float64) == "matmul"

    # A graph that is being compiled does not ask.
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + (automatic_backend_on("cuda", torch.float32) == "compiled")

    assert chosen(torch.zeros(1)).item() == 0


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cpu", torch.float32, "compiled"),
        ("cuda", torch.bfloat16, "compiled"),
        ("cuda", torch.float16, "compiled"),
        ("cuda", torch.float32, "matmul"),
        ("cuda", torch.float64, "matmul"),
    ],
)
def test_auto_chooses_by_device_and_dtype(monkeypatch, device, dtype, backend):
    # As where both libraries are built; fake tensors need no GPU.
    monkeypatch.setattr(compiled, "_CPU_REASON", None)
    monkeypatch.setattr(compiled, "_CUDA_REASON", None)
    with FakeTensorMode():
        x = torch.empty(1, 8, 4, 4, device=device, dtype=dtype)
        assert automatic_backend(x, x, x) == backend
    for major in (7, 8):
        use_gpu(monkeypatch, major, 5)
        assert automatic_backend_on(device, dtype) == (
            "matmul" if device == "cuda" and major < 8 else backend
        )
        reason = compiled.unavailable_reason("cuda")
        assert reason is None if major == 8 else "8.0 or later, the Tesla has 7.5" in reason
    monkeypatch.setattr(compiled, "_CUDA_REASON", "it is not built.")
    monkeypatch.setattr(compiled, "_CPU_REASON", "it is not built.")
    assert available_backends() == {"compiled": "it is not built.", "matmul": None, "reference": None}
    assert automatic_backend(x, x, x) == "matmul"


def test_auto_chooses_by_the_gpu_of_the_tensors(monkeypatch):
    # The current one is cuda:0, whatever the tensors are on.
    monkeypatch.setattr(compiled, "_CUDA_REASON", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    gpus = [
        SimpleNamespace(name="Hopper", major=9, minor=0),
        SimpleNamespace(name="Turing", major=7, minor=5),
    ]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: gpus[torch.device(device).index or 0]
    )
    for dtype in (torch.float32, torch.float16):
        assert automatic_backend_on("cuda", dtype) == "compiled"
        for index, backend in enumerate(("compiled", "matmul")):
            with FakeTensorMode():
                x = torch.empty(1, 8, 4, 4, device=f"cuda:{index}", dtype=dtype)
                weights = torch.empty(10, 8, dtype=dtype), torch.empty(10, dtype=dtype), torch.empty(1)
            assert automatic_backend(x, x, x) == backend
            assert supports_loop(x, *weights, "auto") == (backend == "compiled")
    with pytest.raises(RuntimeError, match=r"8\.0 or later, the Turing has 7\.5\.$"):
        criss_cross_attention(x, x, x, backend="compiled")
    with pytest.raises(RuntimeError, match="the Turing has"):
        recomputed_loops(x, *weights, 1, chunks=1, backend="compiled")


@pytest.mark.parametrize("backend", ["auto", "matmul", "reference"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_that_are_no_dense_tensors_are_named(backend, name):
    inputs = {
        "query": torch.randn(2, 4, 5, 6),
        "key": torch.randn(2, 4, 5, 6),
        "value": torch.randn(2, 8, 5, 6),
    }
    given = inputs[name]
    for other, kind in ((None, "NoneType"), (given.numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got {kind}"):
            criss_cross_attention(**{**inputs, name: other}, backend=backend)
    for other, kind in (
        (given.to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor(list(given)), "nested"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a dense tensor, got a {kind} one"):
            criss_cross_attention(**{**inputs, name: other}, backend=backend)
