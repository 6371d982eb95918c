"""CrissCrossAttention and RCCA against their formula, written out with the op's reference."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ccnet_d2.layers import RCCA, ClipRCCA, CrissCrossAttention, clips_of, criss_cross
from ccnet_d2.ops import BACKENDS, available_backends, criss_cross_attention


def with_gamma(layer, gamma=0.7):
    torch.nn.init.constant_(layer.gamma, gamma)
    return layer


def test_starts_as_the_identity():
    x = torch.randn(2, 16, 5, 6)
    rcca = RCCA(16)
    assert dict(rcca.named_parameters())["gamma"].item() == 0
    assert torch.equal(rcca(x), x)


@pytest.mark.parametrize(("dims", "sizes"), [(1, (7,)), (2, (5, 6)), (3, (3, 5, 4))])
@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_loops_share_weights(dims, sizes, recurrence):
    torch.manual_seed(0)
    layer = with_gamma(RCCA(16, recurrence, dims))
    x = torch.randn(2, 16, *sizes)
    w, b = layer.qkv.weight.flatten(1), layer.qkv.bias
    expected = x
    for _ in range(recurrence):
        projected = torch.einsum("oc,bc...->bo...", w, expected) + b.view(-1, *(1 for _ in sizes))
        q, k, v = projected[:, :2], projected[:, 2:4], projected[:, 4:]
        expected = 0.7 * criss_cross_attention(q, k, v, backend="reference") + expected
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [CrissCrossAttention, RCCA, ClipRCCA])
def test_reduction_is_of_query_and_key(layer):
    for given, key_channels in (({}, 3), ({"reduction": 4}, 6)):
        assert layer(24, **given).qkv.weight.shape[:2] == (24 + 2 * key_channels, 24)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_maps_between_loops_are_channels_last(recurrence, channels_last):
    """So is not the layer's result, nor the gradient of its input, where the input is not."""
    if available_backends()["compiled"] is not None:
        pytest.skip(available_backends()["compiled"])
    maps = []

    class Recording(RCCA):
        def attend(self, x, **kwargs):
            maps.append(super().attend(x, **kwargs))
            return maps[-1]

    layer = with_gamma(Recording(16, recurrence))
    x = torch.randn(2, 16, 5, 6)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    out = layer(x.requires_grad_())
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.stride() == grad.stride() == x.stride()
    assert len(maps) == recurrence
    assert all(between.is_contiguous(memory_format=torch.channels_last) for between in maps[:-1])


@pytest.mark.parametrize("backend", ["matmul", "reference"])
@pytest.mark.parametrize("recurrence", [1, 2])
def test_differentiable_twice_where_the_compiled_op_is_not_chosen(backend, recurrence):
    """What the errors of the others recommend."""
    torch.manual_seed(0)
    layer = with_gamma(RCCA(8, recurrence, reduction=4, backend=backend)).double()
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


def influence(layer, sizes, position):
    """Which inputs the output at `position` depends on, by gradient."""
    x = torch.randn(1, layer.channels, *sizes, requires_grad=True)
    layer(x)[(0, slice(None), *position)].sum().backward()
    return x.grad[0].abs().sum(0) > 0


def test_reach_in_2d():
    torch.manual_seed(0)
    one = influence(with_gamma(RCCA(8, 1)), (5, 6), (2, 3))
    assert one.sum() == 5 + 6 - 1 and one[2].all() and one[:, 3].all()
    assert influence(with_gamma(RCCA(8, 2)), (5, 6), (2, 3)).all()


def test_reach_in_3d():
    torch.manual_seed(0)
    sizes, position = (3, 4, 5), (1, 2, 3)
    one = influence(with_gamma(RCCA(8, 1, spatial_dims=3)), sizes, position)
    assert one.sum() == sum(sizes) - 2
    assert not influence(with_gamma(RCCA(8, 2, spatial_dims=3)), sizes, position).all()
    assert influence(with_gamma(RCCA(8, 3, spatial_dims=3)), sizes, position).all()


def test_3d_with_one_frame_equals_2d():
    torch.manual_seed(0)
    flat, deep = with_gamma(RCCA(16, 2)), with_gamma(RCCA(16, 2, spatial_dims=3))
    deep.qkv.weight.data.copy_(flat.qkv.weight.data.unsqueeze(2))
    deep.qkv.bias.data.copy_(flat.qkv.bias.data)
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(deep(x.unsqueeze(2)).squeeze(2), flat(x), rtol=1e-4, atol=1e-5)


def test_runs_under_autocast():
    layer = with_gamma(RCCA(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(1, 16, 5, 6))
    assert torch.isfinite(out).all()
    out.float().sum().backward()
    assert layer.gamma.grad is not None


def train(layer, x):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings(
    "ignore:.*weight_norm.* is deprecated:FutureWarning"
)  # its successor needs no hook
@pytest.mark.parametrize("backend", ["auto", "matmul"])
@pytest.mark.parametrize("wrap", ["prune", "weight_norm"])
def test_weights_that_a_hook_of_the_projection_makes(wrap, backend):
    x, layer = torch.randn(2, 16, 5, 6), with_gamma(RCCA(16, backend=backend))
    if wrap == "prune":
        prune.l1_unstructured(layer.qkv, "weight", amount=0.5)
        finish = prune.remove
    else:
        nn.utils.weight_norm(layer.qkv)
        finish = nn.utils.remove_weight_norm
    first = layer(x).detach()
    train(layer, x)
    trained = layer(x).detach()
    assert not torch.allclose(trained, first, atol=1e-3)
    finish(layer.qkv, "weight")
    torch.testing.assert_close(layer(x), trained)


class Adapter(nn.Module):
    """Puts a convolution of low rank beside one, as LoRA does."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution
        self.down = nn.Conv2d(convolution.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, convolution.out_channels, 1, bias=False)

    @property
    def weight(self):
        return self.convolution.weight

    @property
    def bias(self):
        return self.convolution.bias

    def forward(self, x):
        return self.convolution(x) + self.up(self.down(x))


@pytest.mark.parametrize("backend", ["auto", "matmul"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_parametrised_weight_is_made_once_for_each_loop(recompute, backend):
    """Spectral norm, for instance, takes a step of its power iteration with each in training."""

    class Counted(nn.Module):
        count = 0

        def forward(self, weight):
            self.count += 1
            return weight

    layer = RCCA(16, 2, backend=backend, recompute=recompute)
    counted = Counted()
    nn.utils.parametrize.register_parametrization(layer.qkv, "weight", counted)
    counted.count = 0  # without those of the registration
    for loops, x in enumerate([torch.randn(1, 16, 5, 4), torch.randn(1, 16, 5, 4, requires_grad=True)]):
        layer(x)
        assert counted.count == (1 if recompute else 2) * (loops + 1)


def test_a_module_in_place_of_the_projection():
    x, layer = torch.randn(2, 16, 5, 6), with_gamma(RCCA(16))
    same = RCCA(16)
    same.load_state_dict(layer.state_dict())
    layer.qkv = adapter = Adapter(layer.qkv)
    with torch.no_grad():
        same.qkv.weight += (adapter.up.weight.flatten(1) @ adapter.down.weight.flatten(1))[..., None, None]
    torch.testing.assert_close(layer(x), same(x))
    layer(x).sum().backward()
    assert adapter.up.weight.grad.norm() > 0
    layer.qkv = nn.Conv2d(16, 20, 1, bias=False)
    same.qkv.load_state_dict({"weight": layer.qkv.weight, "bias": torch.zeros(20)})
    torch.testing.assert_close(layer(x), same(x))


def test_hooks_of_the_projection_are_called_in_clips_too():
    layer, frames, seen = with_gamma(ClipRCCA(16)), torch.randn(6, 16, 4, 5), []
    with clips_of(layer, 3):
        expected = layer(frames)
        layer.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        torch.testing.assert_close(layer(frames), expected)
    assert seen == [20] * layer.recurrence


@pytest.mark.parametrize("backend", ["auto", "matmul"])
@pytest.mark.parametrize(
    "projection",
    [
        nn.Sequential(nn.Conv2d(16, 20, 1), nn.GroupNorm(4, 20)),
        nn.Conv2d(16, 20, 3, padding=1),
        nn.Conv2d(16, 20, 1, groups=4),
        nn.Conv2d(16, 20, (1, 3), padding="same", padding_mode="circular"),
    ],
    ids=["sequence", "3x3", "groups", "padding"],
)
def test_another_projection_is_called(projection, backend):
    """Of clips frame by frame."""
    layer, clips, frames = with_gamma(RCCA(16, backend=backend)), ClipRCCA(16, 1), torch.randn(6, 16, 4, 5)
    layer.qkv = with_gamma(clips).qkv = projection
    expected = frames
    for _ in range(layer.recurrence):
        parts = projection(expected).split([2, 2, 16], dim=1)
        expected = 0.7 * criss_cross_attention(*parts, backend="reference") + expected
    torch.testing.assert_close(layer(frames), expected, rtol=1e-4, atol=1e-5)
    parts = [
        part.unflatten(0, (2, 3)).transpose(1, 2) for part in projection(frames).split([2, 2, 16], dim=1)
    ]
    expected = 0.7 * criss_cross_attention(*parts, backend="reference").transpose(1, 2).flatten(0, 1) + frames
    with clips_of(clips, 3):
        torch.testing.assert_close(clips(frames), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"was replaced: use recompute=False there"):
        layer.recompute = True
        layer(frames)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compiled_graphs_take_the_projection_as_it_is(dims):
    """A layer with recompute would refuse anything else."""
    layer, x = with_gamma(RCCA(16, spatial_dims=dims, recompute=True)), torch.randn(1, 16, *(4, 5, 3)[:dims])
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_recompute_refuses_hooks_of_the_projection():
    layer, x = RCCA(16, recompute=True), torch.randn(1, 16, 4, 5)
    layer.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"its qkv alone, which has hooks.*use recompute=False"):
        layer(x)
    with torch.no_grad():
        layer(x)  # keeps nothing anyhow


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("batch", "other_batch"), [(2, 1), (1, 3)])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_trace_is_saved_and_trained(backend, batch, other_batch, recorded, recompute, tmp_path):
    """With another batch of another size than it was made with."""
    if available_backends().get(backend) is not None:
        pytest.skip(available_backends()[backend])
    layer = with_gamma(RCCA(16, backend=backend, recompute=recompute))
    x = torch.randn(batch, 16, 5, 6)
    with torch.set_grad_enabled(recorded):
        torch.jit.trace(layer, x).save(tmp_path / "layer.pt")
    traced, other = torch.jit.load(tmp_path / "layer.pt"), torch.randn(other_batch, 16, 8, 3)
    torch.testing.assert_close(traced(other), layer(other))
    traced(other).square().sum().backward()
    layer(other).square().sum().backward()
    for got, wanted in zip(traced.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dims", "sizes"), [(1, (7,)), (2, (5, 6)), (3, (3, 5, 4))])
@pytest.mark.parametrize(("recurrence", "recompute"), [(1, True), (2, 1), (3, 3)])
def test_recompute_changes_nothing_but_what_is_kept(backend, dims, sizes, recurrence, recompute):
    if available_backends()[backend] is not None:
        pytest.skip(available_backends()[backend])
    torch.manual_seed(0)
    layers = [
        with_gamma(RCCA(40, recurrence, dims, backend=backend, recompute=value)).double()
        for value in (False, recompute)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 40, *sizes, dtype=torch.float64, requires_grad=True)
    kept, results = [], []
    for layer in layers:
        pointers = {}

        def note(t, pointers=pointers):
            pointers[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = layer(x)
        kept.append(sum(pointers.values()))
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), out)
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted)
    weights = sum(p.untyped_storage().nbytes() for p in layers[1].parameters())
    assert kept[1] <= recurrence * x.untyped_storage().nbytes() + weights < kept[0]
    assert "recompute" in repr(layers[1]) and "recompute" not in repr(layers[0])


def test_recompute_in_distributed_data_parallel(tmp_path):
    """The shared weights' gradients are complete when they are averaged, and averaged once."""
    torch.manual_seed(0)
    layer = with_gamma(RCCA(16, 2, recompute=2))
    x = torch.randn(2, 16, 5, 6)
    wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        averaged = []
        model = torch.nn.parallel.DistributedDataParallel(layer)

        def hook(_state, bucket):
            averaged.extend(bucket.parameters())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        model(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert sorted(map(id, averaged)) == sorted(map(id, layer.parameters()))
    for p, w in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, w)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RCCA(20), "channels=20 is not a positive multiple of reduction=8"),
        (lambda: RCCA(16, recurrence=0), "recurrence must be at least 1 and whole, got 0"),
        (lambda: RCCA(16, spatial_dims=4), "spatial_dims must be 1, 2 or 3"),
        (lambda: RCCA(16, 2.5), "recurrence must be at least 1 and whole, got 2.5"),
        (lambda: RCCA(16, "2"), "recurrence must be at least 1 and whole, got '2'"),
        (lambda: RCCA(16, reduction=8.0), "reduction must be a whole number, got 8.0"),
        (lambda: RCCA(16, recompute=-1), "recompute must be True, False or a number of chunks, got -1"),
        (lambda: RCCA(16, recompute=2.5), "recompute must be True, False or a number of chunks, got 2.5"),
        (
            lambda: RCCA(16, backend="cuda"),
            "backend='cuda' is not one of 'auto', 'compiled', 'matmul', 'reference'",
        ),
        (lambda: RCCA(16, recompute="yes"), "recompute must be True, False or a number of chunks, got 'yes'"),
        (
            lambda: CrissCrossAttention(16)(torch.zeros(1, 8, 4, 4)),
            r"inputs \(B, 16, H, W\), got \(1, 8, 4, 4\)",
        ),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layers_need_torch_alone():
    """Importing ops, layers and losses loads neither Detectron2 nor anything else; triton is torch's own choice."""
    code = (
        "import sys, torch; before = {m.partition('.')[0] for m in sys.modules};"
        "import ccnet_d2.ops, ccnet_d2.layers, ccnet_d2.losses;"
        "after = {m.partition('.')[0] for m in sys.modules} - before - set(sys.stdlib_module_names);"
        "assert after <= {'ccnet_d2', 'triton'}, after"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64]
)
def test_an_input_of_another_dtype_than_the_weights_is_refused_on_every_machine(
    dtype, recompute, monkeypatch
):
    layer = RCCA(16, recompute=recompute)
    for without_products in ((), (torch.float16, torch.bfloat16)):
        monkeypatch.setattr("ccnet_d2.ops.projection._WITHOUT_PRODUCTS", without_products)
        with pytest.raises(
            ValueError, match=rf"x and the weights must have one dtype, got {dtype} and torch.float32"
        ):
            layer(torch.ones(1, 16, 3, 4, dtype=dtype))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    ("dtype", "weights", "low"),
    [
        (
            torch.bfloat16,
            torch.float32,
            torch.bfloat16,
        ),  # behind a convolution, which autocast runs in half precision
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float16),
        (torch.float64, torch.float64, torch.bfloat16),  # which autocast leaves alone
    ],
    ids=str,
)
def test_what_comes_to_the_layer_in_autocast(dtype, weights, low, backend, recompute):
    """The result has the input's dtype, gradients those of what they belong to."""
    if available_backends().get(backend) is not None:
        pytest.skip(available_backends()[backend])
    torch.manual_seed(0)
    layer = with_gamma(RCCA(16, backend=backend, recompute=recompute)).to(weights)
    exact = with_gamma(RCCA(16, backend="reference")).double()
    exact.load_state_dict(layer.state_dict())
    inputs = [torch.randn(2, 16, 5, 6).to(dtype).requires_grad_(), *layer.parameters()]
    exact_inputs = [inputs[0].detach().double().requires_grad_(), *exact.parameters()]
    with torch.autocast("cpu", dtype=low):
        out = layer(inputs[0])
        with torch.no_grad():
            inferred = layer(inputs[0])
    wanted = exact(exact_inputs[0])
    # Drawn in fp32, as versions of torch draw other numbers in half precision: gamma's gradient, a sum, may cancel.
    grad = torch.randn(out.shape).to(out.dtype)
    got = [out, *torch.autograd.grad(out, inputs, grad)]
    wanted = [wanted, *torch.autograd.grad(wanted, exact_inputs, grad.double())]
    unit = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[
        dtype if dtype == torch.float64 else low
    ]
    for like, value, expected in zip((inputs[0], *inputs), got, wanted, strict=True):
        assert value.dtype == like.dtype
        assert (value.double() - expected).norm() <= unit * expected.norm()
    assert inferred.dtype == dtype
    assert (inferred.double() - wanted[0]).norm() <= unit * wanted[0].norm()


@pytest.mark.parametrize(
    ("recompute", "recurrence", "wanted"), [(True, 1, 3), (True, 2, 5), (True, 3, 5), (1, 1, 1), (7, 2, 7)]
)
def test_chunks_of_a_layer_with_recompute(recompute, recurrence, wanted, monkeypatch):
    given, run = [], criss_cross.recomputed_loops
    monkeypatch.setattr(
        criss_cross,
        "recomputed_loops",
        lambda *args, **options: given.append(options) or run(*args, **options),
    )
    layer = RCCA(16, recurrence, recompute=recompute)
    layer(torch.randn(1, 16, 4, 5))
    [options] = given
    assert options == {"loops": recurrence, "chunks": wanted, "backend": "auto"}
