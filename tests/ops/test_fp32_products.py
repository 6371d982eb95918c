"""fp32 products on matrix and on vector units against double precision, held to what PyTorch's own fp32 products reach.

Those on vector units are tried where they do not pay as well.
"""

from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import library
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from ccnet_d2.layers import RCCA
from ccnet_d2.ops import compiled, fp32_products, projection

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)

# Matrix units: whole blocks of 128 positions, 32 columns and 32 steps, and remainders of each. Vector units: of 96, 64
# and 128. Several images; lines and volumes.
CASES = [
    (1, 192, 256, (16, 16)),
    (1, 200, 33, (17, 19)),
    (2, 193, 7, (11, 13)),
    (3, 256, 320, (129,)),
    (1, 512, 640, (3, 9, 11)),
    (2, 333, 481, (1, 300)),
    (1, 224, 1, (257,)),
    (1, 256, 128, (18, 32)),
    (1, 193, 129, (17, 17)),
]
# Too few channels for matrix units.
NARROW = [(1, 32, 40, (32, 40)), (2, 37, 5, (29, 31))]
# Positions of a sum that is folded several times.
LONG = (1, 192, 48, (47, 101))


@pytest.fixture(params=["amx", "avx512", "avx2"])
def units(request, monkeypatch):
    """Products by one instruction set, as on a processor where they pay."""
    monkeypatch.setenv("CCNET_CPU_ISA", request.param)
    if compiled.instruction_set(torch.float32) != request.param:
        pytest.skip(f"this processor or build has no {request.param} kernels")
    sizes = fp32_products._PAYING[request.param]._replace(positions=256)
    monkeypatch.setattr(fp32_products, "_paying", lambda _: sizes)
    return request.param


def draw(batch, channels, sizes, *, channels_last):
    x = torch.randn(batch, channels, *sizes)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("case", [*CASES, LONG, *NARROW], ids=str)
@pytest.mark.parametrize("x_last", [True, False])
@pytest.mark.parametrize("grad_last", [True, False])
@pytest.mark.parametrize("out_last", [True, False])
def test_values(case, x_last, grad_last, out_last, units):
    if case in NARROW and units == "amx":
        pytest.skip("matrix units are left alone")
    torch.manual_seed(0)
    batch, channels, outputs, sizes = case
    x = draw(batch, channels, sizes, channels_last=x_last)
    weight, bias = torch.randn(outputs, channels), torch.randn(outputs)
    grad = draw(batch, outputs, sizes, channels_last=grad_last)
    assert fp32_products.pays(x, weight, bias) and fp32_products.pays_for_weight(grad, x)

    projected = fp32_products.project(x, weight, bias)
    of_input = fp32_products.input_gradient(grad, weight, x, channels_last=out_last)
    of_weight = fp32_products.weight_gradient(grad, x)

    assert projected.movedim(1, -1).is_contiguous()
    assert (of_input.movedim(1, -1) if out_last else of_input).is_contiguous()
    assert of_weight.is_contiguous()

    def computed(x, weight, bias, grad):
        rows, grad_rows = (t.flatten(2).transpose(1, 2) for t in (x, grad))
        return (
            (rows @ weight.t() + bias).transpose(1, 2).reshape(projected.shape),
            (rows + grad_rows @ weight).transpose(1, 2).reshape(x.shape),
            (grad_rows.transpose(1, 2) @ rows).sum(0),
        )

    # Written to memory that is there, where the input's gradient may be added to what it holds.
    room = draw(batch, outputs + 5, sizes, channels_last=True)
    around = room.clone()
    fp32_products.project_into(x, weight, bias, room[:, 3 : 3 + outputs])
    around[:, 3 : 3 + outputs] = projected
    assert torch.equal(room, around)
    if x_last == out_last:
        total = x.clone()
        fp32_products.input_gradient_into(grad, weight, total, total)
        assert torch.equal(total, of_input) and total.stride() == x.stride()
    total = torch.empty_like(of_input)
    fp32_products.input_gradient_into(grad, weight, x, total)
    assert torch.equal(total, of_input)

    wanted = computed(*(t.double() for t in (x, weight, bias, grad)))
    plain = computed(x, weight, bias, grad)
    for got, exact, by_torch in zip((projected, of_input, of_weight), wanted, plain, strict=True):
        assert relative(got, exact) <= max(1.5 * relative(by_torch, exact), 2e-7)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads, units):
    torch.manual_seed(0)
    x, grad = draw(2, 256, (15, 37), channels_last=False), draw(2, 320, (15, 37), channels_last=True)
    weight, bias = torch.randn(320, 256), torch.randn(320)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (
            (
                fp32_products.project(x, weight, bias),
                fp32_products.input_gradient(grad, weight, x, channels_last=False),
                fp32_products.weight_gradient(grad, x),
            )
            for _ in range(2)
        )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[0], fp32_products.project(x, weight, bias))
    assert torch.equal(first[1], fp32_products.input_gradient(grad, weight, x, channels_last=False))
    assert relative(first[2], torch.einsum("bohw,bchw->oc", grad.double(), x.double())) < 1e-6


def test_numbers_of_every_size(units):
    """On matrix units each number is split into parts of its own: small ones beside large ones lose nothing."""
    torch.manual_seed(0)
    scale = 10.0 ** torch.arange(-18, 19).repeat(7)[:256]
    x = torch.randn(1, 256, 300) * scale.view(1, -1, 1)
    weight = torch.randn(40, 256) / scale
    got = fp32_products.project(x, weight, torch.zeros(40))
    assert relative(got, torch.einsum("bcn,oc->bon", x.double(), weight.double())) < 4e-7


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value, units):
    x = torch.randn(1, 256, 300)
    x[0, 3, 200] = value
    got = fp32_products.project(x, torch.randn(40, 256), torch.randn(40))
    assert not got[..., 200].isfinite().any()
    others = torch.arange(300) != 200
    assert got[..., others].isfinite().all()


@pytest.mark.parametrize("recurrence", [1, 2])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("recompute", [False, 2])
def test_layer(recurrence, channels_last, recompute, units, monkeypatch):
    """The whole layer, whose gradients go through every product, against itself in double precision."""
    torch.manual_seed(0)
    layer = RCCA(256, recurrence, recompute=recompute)
    with torch.no_grad():
        layer.gamma.fill_(0.5)
    x = draw(2, 256, (17, 21), channels_last=channels_last)
    grad = draw(2, 256, (17, 21), channels_last=channels_last)
    used = []
    for name in ("project", "project_into", "weight_gradient", "input_gradient", "input_gradient_into"):
        function = getattr(fp32_products, name)
        monkeypatch.setattr(
            fp32_products, name, lambda *a, _f=function, _n=name, **k: used.append(_n) or _f(*a, **k)
        )

    def gradients(layer, x, grad):
        x = x.clone().requires_grad_()
        out = layer(x)
        return out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)

    got = gradients(layer, x, grad)
    wanted = {"project", "weight_gradient"}
    if recompute:
        wanted.add("project_into")
    wanted |= {"input_gradient_into"} if recompute and recurrence > 1 else {"input_gradient"}
    assert set(used) == wanted
    wanted = gradients(layer.double(), x.double(), grad.double())
    for one, exact in zip(got, wanted, strict=True):
        # What is left of rounding: the gradient of the key's bias is zero, and gamma's a sum of 180 thousand products
        # that mostly cancel.
        least = 1e-5 if one.numel() > 1 else 1e-3
        assert (one.double() - exact).norm() <= 2e-6 * exact.norm() + least


def test_where_they_are_left_alone(units):
    x, weight, bias = torch.randn(1, 256, 300), torch.randn(40, 256), torch.randn(40)
    assert fp32_products.pays(x, weight, bias)
    assert not fp32_products.pays(x.double(), weight.double())
    assert not fp32_products.pays(x[:, :, ::2], weight)
    assert not fp32_products.pays(x[..., :200], weight)
    assert not fp32_products.pays(x, weight.t().contiguous().t())
    for shape, outputs in (((1, 256, 200), 40), ((1, 64, 300), 40), ((1, 256, 300), 4097)):
        assert not fp32_products.pays(torch.empty(shape), torch.empty(outputs, shape[1]))
    grad, gaps = torch.randn(1, 40, 300), torch.randn(1, 256, 600)[..., ::2]
    assert fp32_products.pays_for_weight(grad, x) and not fp32_products.pays(gaps, weight)
    assert not fp32_products.pays_for_weight(grad, gaps) and not fp32_products.pays_for_weight(
        gaps[:, :40], x
    )
    assert not fp32_products.pays(x[:, :31], weight[:, :31])
    assert fp32_products.pays(x[:, :128].contiguous(), weight[:, :128].contiguous()) == (units != "amx")
    assert not fp32_products.pays(x, weight, bias.requires_grad_())
    with torch.no_grad():
        assert fp32_products.pays(x, weight, bias)
    with torch.autocast("cpu"):
        assert not fp32_products.pays(x, weight)


def test_where_no_kernels_have_them(monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", "portable")
    x, weight, bias = torch.randn(1, 256, 300), torch.randn(40, 256), torch.randn(40)
    assert not fp32_products.pays(x, weight, bias)
    with pytest.raises(RuntimeError, match="have no products of fp32"):
        fp32_products.project(x, weight, bias)


@pytest.mark.parametrize("best", ["avx512", "avx2"])
def test_vector_units_pay_where_they_are_not_intel_s(best, monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", best)
    info = Path("/proc/cpuinfo")
    if compiled.instruction_set(torch.float32) != best or not info.exists():
        pytest.skip(f"no {best}, or no telling whose it is")
    assert torch.ops.ccnet_d2.has_fp32_products() == ("GenuineIntel" not in info.read_text())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recorded", [True, False])
def test_traces_hold_no_products_of_this_processor(recorded, units):
    """They may run on another one."""
    layer, x = RCCA(256, 1).eval().requires_grad_(recorded), torch.randn(1, 256, 17, 21)
    torch.nn.init.ones_(layer.gamma)
    traced = torch.jit.trace(layer, x, check_trace=False)
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({2: height, 3: width},))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    kinds |= {str(node.target) for node in exported.graph.nodes}
    assert any("criss_cross" in kind for kind in kinds) and not any("projection" in kind for kind in kinds)
    for size in ((17, 21), (5, 7)):
        x = torch.randn(1, 256, *size)
        for run in (traced, exported.module()):
            torch.testing.assert_close(run(x), layer(x), rtol=1e-5, atol=1e-5)


def test_projection_keeps_its_history():
    """Where a gradient is recorded, PyTorch's products are used, which are differentiable twice."""
    x, weight = torch.randn(1, 192, 300, requires_grad=True), torch.randn(24, 192, requires_grad=True)
    out = projection.project(x, weight, torch.zeros(24))
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), weight)[0].abs().sum() > 0


def test_refusals(units):
    x, weight, bias = torch.randn(1, 256, 300), torch.randn(40, 256), torch.randn(40)
    grad = torch.randn(1, 40, 300)
    with pytest.raises(RuntimeError, match="x must have 256 channels, got 255"):
        fp32_products.project(x[:, :255], weight, bias)
    with pytest.raises(RuntimeError, match="float32"):
        fp32_products.project(x.double(), weight, bias)
    with pytest.raises(RuntimeError, match="bias"):
        fp32_products.project(x, weight, bias[:-1])
    with pytest.raises(RuntimeError, match="same spatial sizes"):
        fp32_products.weight_gradient(grad, x[..., :299])
    with pytest.raises(RuntimeError, match="same spatial sizes"):
        fp32_products.input_gradient(grad, weight, x[..., :299], channels_last=True)
    for out, message in (
        (grad[:, 1:], "with the channels of weight"),
        (grad.double(), "of float32"),
        (grad[..., :299], "same spatial sizes"),
        (torch.empty(1, 80, 600)[:, ::2, ::2], "dense over channels or positions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fp32_products.project_into(x, weight, bias, out)
    with pytest.raises(RuntimeError, match="out must have 256 channels, got 255"):
        fp32_products.input_gradient_into(grad, weight, x, x[:, :255])
    with pytest.raises(RuntimeError, match="same spatial sizes"):
        fp32_products.input_gradient_into(grad, weight, x, x[..., :299])
    many = torch.randn(1, 256, 3, 1, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"one to three spatial axes, got 8 dimensions\.$"):
        fp32_products.project(many, weight, bias)
    for channels_last in (False, True):
        with pytest.raises(RuntimeError, match="one to three spatial axes"):
            fp32_products.input_gradient(many[:, :40], weight, None, channels_last=channels_last)
    (first,) = torch.autograd.grad(
        fp32_products.project(x.requires_grad_(), weight.requires_grad_(), bias).square().sum(),
        x,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients(needed, channels_last, units):
    torch.manual_seed(0)
    x, weight, bias = (
        draw(2, 200, (11, 13), channels_last=channels_last),
        torch.randn(40, 200),
        torch.randn(40),
    )
    grad = torch.randn(2, 40, 11, 26)[..., ::2]
    inputs = [t.requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
    wanted = [t for t in inputs if t.requires_grad]
    got = torch.autograd.grad(fp32_products.project(*inputs), wanted, grad)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    out = torch.einsum("bchw,oc->bohw", *doubles[:2]) + doubles[2].view(-1, 1, 1)
    expected = torch.autograd.grad(out, [t for t in doubles if t.requires_grad], grad.double())
    for value, exact in zip(got, expected, strict=True):
        assert value.shape == exact.shape and relative(value, exact) < 1e-6


@pytest.mark.parametrize(
    ("dynamic", "channels_last", "recompute"),
    [(True, False, False), (True, True, True), (False, False, False)],
)
def test_compiled_graphs(dynamic, channels_last, recompute, units, monkeypatch):
    """They have the products, whatever the image's size, and the values of the layer as it is."""
    monkeypatch.setattr(fp32_products, "_PAYING_HERE", fp32_products._PAYING[units])
    layer = RCCA(256, 2, recompute=recompute)
    torch.nn.init.ones_(layer.gamma)
    torch.compiler.reset()
    targets = set()

    def keep(graph, _):
        targets.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    compiled_layer = torch.compile(
        layer, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep)
    )
    for sizes in ((17, 21), (5, 7)):
        x = draw(2, 256, sizes, channels_last=channels_last).requires_grad_()
        inputs = [x, *layer.parameters()]
        outs = [run(x) for run in (compiled_layer, layer)]
        grads = [torch.autograd.grad(out.square().mean(), inputs) for out in outs]
        for value, expected in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    names = ("projection_forward", "projection_weight_gradient", "projection_input_gradient")
    assert {f"ccnet_d2.{name}.default" for name in names} <= targets
    assert not any(name in target for target in targets for name in (".mm.", ".addmm", ".bmm", ".baddbmm"))


def test_opcheck_and_flops(units):
    x, weight, bias = torch.randn(2, 256, 5, 60), torch.randn(40, 256), torch.randn(40)
    grad = torch.randn(2, 5, 60, 40).movedim(-1, 1)
    ops = torch.ops.ccnet_d2
    calls = [
        (ops.projection_forward, (x, weight, bias)),
        (ops.projection_forward_into, (x, weight, bias, torch.empty_like(grad))),
        (ops.projection_input_gradient_into, (grad, weight, x, torch.empty_like(x))),
        (ops.projection_weight_gradient, (grad, x)),
        (ops.projection_input_gradient, (grad, weight, x, True)),
        (ops.projection_input_gradient, (grad, weight, x, False)),
        (ops.projection_input_gradient, (grad, weight, None, True)),
        (ops.projection_input_gradient, (grad, weight, None, False)),
    ]
    for op, arguments in calls:
        library.opcheck(op, arguments)
        with FlopCounterMode(display=False) as counter:
            op(*arguments)
        assert counter.get_total_flops() == 2 * 2 * 300 * 40 * 256
