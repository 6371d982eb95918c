"""The 1x1 convolution and its gradients against products in double precision."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ccnet_d2.layers import RCCA
from ccnet_d2.ops import compiled, projection
from ccnet_d2.ops.layout import channel_sums
from ccnet_d2.ops.projection import (
    add_input_gradient,
    input_gradient,
    input_gradient_into,
    project,
    project_into,
    weight_gradient,
)

UNIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(*shape, dtype, channels_last=False):
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


# The last ones are long enough to be multiplied in runs on matrix units, without and with positions left over.
@pytest.mark.parametrize("sizes", [(7,), (5, 6), (2, 3, 4), (32, 40), (37, 43), (1031,)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_values(sizes, batch, dtype, channels_last, recorded):
    torch.manual_seed(0)
    x = draw(batch, 24, *sizes, dtype=dtype, channels_last=channels_last)
    grad = draw(batch, 30, *sizes, dtype=dtype, channels_last=True)
    weight, bias = draw(30, 24, dtype=dtype), draw(30, dtype=dtype)
    total = x.flip(1) if not channels_last else x.movedim(1, -1).flip(-1).movedim(-1, 1)
    added = total.clone()

    with torch.set_grad_enabled(recorded):
        got = {
            "projected": project(x, weight, bias),
            "weight": weight_gradient(grad, x),
            "bias": channel_sums(grad),
            "input": input_gradient(grad, weight),
        }
        add_input_gradient(added, grad, weight)

    x, grad, weight, bias = (t.double() for t in (x, grad, weight, bias))
    of_input = torch.einsum("bo...,oc->bc...", grad, weight)
    wanted = {
        "projected": torch.einsum("bc...,oc->bo...", x, weight) + bias.view(-1, *(1 for _ in sizes)),
        "weight": torch.einsum("bon,bcn->oc", grad.flatten(2), x.flatten(2)),
        "bias": grad.flatten(2).sum((0, 2)),
        "input": of_input,
    }
    for name, value in [*got.items(), ("added", added)]:
        expected = of_input + total.double() if name == "added" else wanted[name]
        assert value.dtype == dtype and value.shape == expected.shape, name
        assert (value.double() - expected).norm() <= UNIT[dtype] * expected.norm(), name
    assert got["weight"].is_contiguous()
    for name in ("projected", "input"):
        assert got[name].movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("sizes", [(7,), (5, 6), (2, 3, 4), (32, 40)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_written_to_what_is_there(sizes, batch, dtype, channels_last):
    torch.manual_seed(0)
    x = draw(batch, 32, *sizes, dtype=dtype, channels_last=channels_last)
    grad = draw(batch, 30, *sizes, dtype=dtype, channels_last=True)
    weight, bias = draw(30, 32, dtype=dtype), draw(30, dtype=dtype)
    room = draw(batch, 37, *sizes, dtype=dtype, channels_last=True)
    around = room.clone()
    project_into(room[:, 4:34], x, weight, bias)
    exact = project(*(t.double() for t in (x, weight, bias)))
    assert (room[:, 4:34].double() - exact).norm() <= UNIT[dtype] * exact.norm()
    assert torch.equal(room[:, :4], around[:, :4]) and torch.equal(room[:, 34:], around[:, 34:])

    exact = x.double() + input_gradient(grad.double(), weight.double())
    for into in (x, torch.empty_like(x), draw(*x.shape, dtype=dtype, channels_last=not channels_last)):
        residual = x.clone() if into is not x else x
        strides = into.stride()
        input_gradient_into(into, residual, grad, weight)
        assert (into.double() - exact).norm() <= UNIT[dtype] * exact.norm() and into.stride() == strides
        x = residual if into is not x else residual.sub_(input_gradient(grad, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_gradient_in_half_precision_added_to_an_fp32_one(dtype, channels_last, own):
    """As inside autocast."""
    torch.manual_seed(0)
    x = draw(2, 24, 5, 6, dtype=torch.float32, channels_last=channels_last)
    grad, weight = draw(2, 30, 5, 6, dtype=dtype, channels_last=True), draw(30, 24, dtype=dtype)
    wanted = x + input_gradient(grad, weight)
    room = x if own else torch.empty_like(x)
    input_gradient_into(room, x, grad, weight)
    assert torch.equal(room, wanted) and room.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(32, 40), (37, 43), (1031,)], ids=str
)  # without and with positions left over
def test_weight_gradient_in_runs(monkeypatch, dtype, sizes):
    """As on matrix units, where that is faster."""
    torch.manual_seed(0)
    monkeypatch.setattr(projection, "better_in_fp32", lambda x: False)
    monkeypatch.setattr(projection, "_pays_in_runs", lambda x: True)
    x, grad = draw(1, 24, *sizes, dtype=dtype), draw(1, 30, *sizes, dtype=dtype, channels_last=True)
    with Products() as products:
        got = weight_gradient(grad, x)
    exact = torch.einsum("bon,bcn->oc", grad.double().flatten(2), x.double().flatten(2))
    assert (got.double() - exact).norm() <= UNIT[dtype] * exact.norm() and got.is_contiguous()
    assert products.dtypes == {dtype}


@pytest.mark.parametrize("instructions", ["amx", "avx512_bf16", None])
def test_what_is_multiplied_in_runs(monkeypatch, instructions):
    monkeypatch.setattr(projection.compiled, "instruction_set", lambda dtype: instructions)
    long, units = draw(1, 8, 32, 32, dtype=torch.bfloat16), instructions == "amx"
    assert projection._pays_in_runs(long) is units and projection._pays_in_runs(long.half()) is units
    for x in (long.float(), long[..., :31], long.to(memory_format=torch.channels_last)):
        assert not projection._pays_in_runs(x)


class Products(TorchDispatchMode):
    """The dtypes that PyTorch multiplies matrices of."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not compiled.is_available(), reason=str(compiled.unavailable_reason()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recurrence", [1, 2])
@pytest.mark.parametrize("recompute", [False, 2])
def test_half_precision_that_the_processor_does_not_multiply(
    dtype, channels_last, recurrence, recompute, monkeypatch
):
    """PyTorch does so number by number, which takes a hundred times as long as by way of fp32."""
    torch.manual_seed(0)
    layer = RCCA(32, recurrence, backend="compiled", recompute=recompute).to(dtype)
    torch.nn.init.ones_(layer.gamma)
    x, grad = (draw(2, 32, 9, 11, dtype=dtype, channels_last=channels_last) for _ in range(2))

    def gradients(layer, x, grad):
        x = x.clone().requires_grad_()
        out = layer(x)
        return out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)

    monkeypatch.setattr(projection, "_WITHOUT_PRODUCTS", {dtype})
    with Products() as products:
        got = gradients(layer, x, grad)
    assert products.dtypes <= {torch.float32}
    wanted = gradients(layer.double(), x.double(), grad.double())
    for value, expected in zip(got, wanted, strict=True):
        assert value.dtype == dtype
        # Of the gradient of the key's bias, which is zero, rounding is left.
        assert (value.double() - expected).norm() <= 4 * UNIT[dtype] * (expected.norm() + 1)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_means_the_same_whether_recorded_or_not(dtype, channels_last, images):
    x = draw(images, 24, 5, 6, dtype=dtype, channels_last=channels_last)
    weight, bias = draw(30, 24, dtype=torch.float32), draw(30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = project(x.requires_grad_(), weight, bias)
        with torch.no_grad():
            got = project(x, weight, bias)
    assert wanted.requires_grad and not got.requires_grad
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_by_way_of_fp32_in_autocast(dtype, recorded, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 24, 5, 6, requires_grad=recorded), torch.randn(30, 24), torch.randn(30)
    wide = [t.to(dtype).float() for t in (x, weight, bias)]
    monkeypatch.setattr(projection, "_WITHOUT_PRODUCTS", {dtype})
    with Products() as products, torch.autocast("cpu", dtype):
        got = project(x, weight, bias)
    assert products.dtypes == {torch.float32} and got.requires_grad == recorded
    assert torch.equal(got, project(*wide).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_by_way_of_fp32_rounds_once(dtype, monkeypatch):
    torch.manual_seed(0)
    x, grad = draw(1, 24, 5, 6, dtype=dtype), draw(1, 30, 5, 6, dtype=dtype, channels_last=True)
    weight, bias, total = draw(30, 24, dtype=dtype), draw(30, dtype=dtype), draw(1, 24, 5, 6, dtype=dtype)
    monkeypatch.setattr(projection, "_WITHOUT_PRODUCTS", {dtype})
    wide = [t.float() for t in (x, grad, weight, bias, total)]
    assert torch.equal(project(x, weight, bias), project(wide[0], wide[2], wide[3]).to(dtype))
    assert torch.equal(weight_gradient(grad, x), weight_gradient(wide[1], wide[0]).to(dtype))
    assert torch.equal(input_gradient(grad, weight), input_gradient(wide[1], wide[2]).to(dtype))
    room = draw(1, 40, 5, 6, dtype=dtype, channels_last=True)
    project_into(room[:, 5:35], x, weight, bias)
    assert torch.equal(room[:, 5:35], project(x, weight, bias))
    add_input_gradient(total, grad, weight)
    add_input_gradient(wide[4], wide[1], wide[2])
    assert torch.equal(total, wide[4].to(dtype))


@pytest.mark.parametrize(
    ("batch", "channels_last", "shape"),
    [(1, False, (30, 24)), (1, True, (30, 24)), (2, True, (60, 24)), (2, False, (2, 30, 24))],
)
def test_one_matrix_where_the_map_is_one_in_memory(batch, channels_last, shape):
    """One long product is faster than several, and no map is copied for it."""
    x = draw(batch, 24, 5, 6, dtype=torch.float32, channels_last=channels_last)
    rows = projection._rows(x)
    assert rows.shape == shape and rows.data_ptr() == x.data_ptr()
    assert torch.equal(rows.reshape(-1, 24), x.movedim(1, -1).reshape(-1, 24))


@pytest.mark.parametrize("answer", [True, False])
def test_pytorch_s_library_says_which_half_precision_it_multiplies(answer, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer)
    for there in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda there=there: there)
        assert projection._has_products_of("bf16") is (there and answer)
