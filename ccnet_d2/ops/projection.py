"""A 1x1 convolution as one matrix product, and the products of its gradient, reading NCHW and channels-last maps as
they lie in memory.

Shapes: B batch, C channels of the input, O of the output, S spatial sizes, N number of positions.
"""

import torch
from torch import Tensor

from . import compiled, fp32_products
from .aligned_rows import with_aligned_rows
from .autocast import autocast_disabled, compute_dtype, refuse_mixed_dtypes
from .layout import is_channels_last, on_huge_pages
from .transforms import is_traced, is_transformed

_RUNS = 4
_LONG_ENOUGH = 1024  # positions


def _has_products_of(name: str) -> bool:
    """Whether PyTorch's library for CPUs multiplies this dtype ("bf16", "fp16") on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    has: bool = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    return has


_WITHOUT_PRODUCTS = {
    dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if not _has_products_of(name)
}


def better_in_fp32(x: Tensor) -> bool:
    """Whether x is multiplied in half precision, by its dtype or by autocast, and PyTorch does so number by number.

    By way of fp32 products take a hundredth of the time and are more exact.
    """
    return x.device.type == "cpu" and compute_dtype(x) in _WITHOUT_PRODUCTS


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution.

    Args:
        x: (B, C, *S).
        weight: (O, C).
        bias: (O,).

    Returns:
        (B, O, *S), channels-last in memory whatever x is, as the attention reads it; a convolution would answer in the
        layout it is given.

    Raises:
        ValueError: x and the weight differ in dtype outside autocast.
    """
    refuse_mixed_dtypes(x, weight)
    if better_in_fp32(x):
        dtype = compute_dtype(x)
        with autocast_disabled(x.device):
            return project(*(t.to(dtype).float() for t in (x, weight, bias))).to(dtype)
    if fp32_products.pays(x, weight, bias):
        return fp32_products.project(x, weight, bias)
    batch, _, *spatial = x.shape
    rows, outputs = _rows(with_aligned_rows(x)), weight.shape[0]
    out = None
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_traced()
    if not (recorded or is_transformed(x, weight, bias)):
        # Autocast leaves products alone that are written to a given tensor.
        dtype = compute_dtype(x)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
        out = on_huge_pages(rows.new_empty((*rows.shape[:-1], outputs)))
    if rows.dim() == 2:
        out = torch.addmm(bias, rows, weight.t(), out=out)
    else:
        out = torch.baddbmm(bias, rows, weight.t().expand(batch, -1, -1), out=out)
    return out.view(batch, *spatial, outputs).movedim(-1, 1)


def project_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """`project`, written to `out`: (B, O, *S), all or some channels of a channels-last map; not differentiable."""
    if better_in_fp32(x):
        out.copy_(project(x, weight, bias))
    elif fp32_products.pays(x, weight, bias):
        fp32_products.project_into(x, weight, bias, out)
    else:
        for image, result in zip(_image_rows(x), _image_rows(out), strict=True):
            torch.addmm(bias, image, weight.t(), out=result)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Of the weight: (B, O, *S) channels-last and (B, C, *S) -> (O, C)."""
    if better_in_fp32(x):
        return weight_gradient(grad.float(), x.float()).to(x.dtype)
    if fp32_products.pays_for_weight(grad, x):
        return fp32_products.weight_gradient(grad, x)
    rows = _rows(with_aligned_rows(x))
    if x.device.type != "cpu":
        if rows.dim() == 3:
            return torch.bmm(_image_rows(grad).transpose(1, 2), rows).sum(0)
        return _rows(grad).t() @ rows
    # The operand with fewer columns is the one that is transposed: up to a fifth faster on CPUs than the other way.
    if rows.dim() == 3:
        return torch.bmm(rows.transpose(1, 2), _image_rows(grad)).sum(0).t().contiguous()
    if _pays_in_runs(x):
        return _product_in_runs(rows, _rows(grad)).t().contiguous()
    return (rows.t() @ _rows(grad)).t().contiguous()


def _pays_in_runs(x: Tensor) -> bool:
    """Whether the weight's gradient of this map, of one image, is computed in runs.

    Half precision in NCHW: a third faster than one long product on matrix units, up to a fifth slower elsewhere.
    """
    if torch.compiler.is_compiling():  # the graph is to take any length
        return False
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and not is_channels_last(x)
        and x.shape[2:].numel() >= _LONG_ENOUGH
        and compiled.instruction_set(x.dtype) == "amx"
    )


def _product_in_runs(rows: Tensor, grad_rows: Tensor) -> Tensor:
    """(N, C) and (N, O) -> (C, O), as the sum of products over four runs of positions."""
    length = len(rows) // _RUNS
    whole = _RUNS * length
    runs, grad_runs = (x[:whole].unflatten(0, (_RUNS, length)) for x in (rows, grad_rows))
    total = torch.bmm(runs.transpose(1, 2), grad_runs).sum(0)
    return total.addmm_(rows[whole:].t(), grad_rows[whole:]) if whole < len(rows) else total


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Of the input: (B, O, *S) channels-last and (O, C) -> (B, C, *S) channels-last."""
    if better_in_fp32(grad):
        return input_gradient(grad.float(), weight.float()).to(grad.dtype)
    batch, _, *spatial = grad.shape
    return (_rows(grad) @ weight).view(batch, *spatial, weight.shape[1]).movedim(-1, 1)


def add_input_gradient(total: Tensor, grad: Tensor, weight: Tensor) -> None:
    """Add the gradient of the input to `total`, in place: no product is held beside it.

    Args:
        total: (B, C, *S), NCHW or channels-last without gaps.
        grad: (B, O, *S), channels-last, of total's dtype.
        weight: (O, C), of total's dtype.
    """
    if better_in_fp32(total):
        wide = total.float()
        add_input_gradient(wide, grad.float(), weight.float())
        total.copy_(wide)
        return
    if is_channels_last(total):
        _rows(total).addmm_(_rows(grad), weight)
        return
    transposed = weight.t()
    if weight.device.type == "cpu":  # where products of half precision are a third faster then
        transposed = transposed.contiguous()
    total.flatten(2).baddbmm_(transposed.expand(total.shape[0], -1, -1), _image_rows(grad).transpose(1, 2))


def input_gradient_into(room: Tensor, residual: Tensor, grad: Tensor, weight: Tensor) -> None:
    """The gradient of the input and `residual`, written to `room`.

    Args:
        room: (B, C, *S), NCHW or channels-last without gaps, of residual's dtype; may be the residual itself.
        residual: (B, C, *S), NCHW or channels-last without gaps.
        grad: (B, O, *S), channels-last.
        weight: (O, C), of grad's dtype.
    """
    if residual.dtype == grad.dtype and fp32_products.pays(grad, weight):
        fp32_products.input_gradient_into(grad, weight, residual, room)
        return
    if room is not residual:
        room.copy_(residual)
    if residual.dtype == grad.dtype:
        add_input_gradient(room, grad, weight)
    else:
        room.add_(input_gradient(grad, weight))


def _rows(x: Tensor) -> Tensor:
    """Positions as rows, a view where x has no gaps: (B * N, C) where one matrix can be it, else (B, N, C)."""
    last = x.movedim(1, -1)
    # A traced graph is to take any batch.
    if x.shape[0] == 1 and not is_traced():
        return x.flatten(2).squeeze(0).t()
    if last.is_contiguous():
        return last.reshape(-1, x.shape[1])
    return x.flatten(2).transpose(1, 2)


def _image_rows(x: Tensor) -> Tensor:
    """Positions as rows, image by image: (B, N, C), a view where x is channels-last."""
    return x.movedim(1, -1).flatten(1, -2)
