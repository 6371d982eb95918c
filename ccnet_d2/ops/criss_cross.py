"""The public criss-cross attention function."""

from typing import Any

import torch
from torch import Tensor

from .autocast import autocasts, compute_dtype
from .backends import select_backend

_MAX_SPATIAL_DIMS = 3
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
    """Attend from every position to all positions on the axis-parallel lines through it.

    A position's keys are the positions that differ from it along at most one axis, itself counted once:
    H+W-1 keys in 2D, T+H+W-2 in 3D. One softmax runs over all of them; energies are not scaled. Energies, softmax
    and accumulation are at least fp32 whatever the input dtype. (CCNet, TPAMI, Sec. 3.2, Eq. 1-2 without the
    residual; Sec. 3.5 for 3D.)

    Args:
        query: (B, C', *S), S being one to three spatial sizes, each >= 1.
        key: (B, C', *S).
        value: (B, C, *S). All three share one floating dtype (fp16, bf16, fp32 or fp64) and one device. Under
            autocast they may differ, and are then all cast to autocast's dtype.
        backend: "auto" (the fastest that runs for these inputs), "compiled", "matmul" or "reference".

    Returns:
        (B, C, *S), dtype of `value`. Memory format may be channels-last; values do not depend on it.

    Raises:
        TypeError: an input is no tensor.
        ValueError: an input is not dense, shapes, dtypes or devices do not fit together, or `backend` is unknown.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    _check_tensors(query=query, key=key, value=value)
    query, key, value = _together_under_autocast(query, key, value)
    _check(query, key, value)
    return select_backend(backend, query, key, value)(query, key, value)


def _together_under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if query.dtype == key.dtype == value.dtype or not all(autocasts(x) for x in (query, key, value)):
        return query, key, value
    dtype = compute_dtype(query)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _check_tensors(**inputs: Any) -> None:
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
        if x.is_nested or x.layout is not torch.strided:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise ValueError(f"{name} must be a dense tensor, got a {kind} one.")


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    dims = query.dim() - 2
    if not 1 <= dims <= _MAX_SPATIAL_DIMS:
        raise ValueError(
            f"query must be (B, C', *S) with one to {_MAX_SPATIAL_DIMS} spatial axes, got shape {tuple(query.shape)}."
        )
    if key.shape != query.shape:
        raise ValueError(
            f"key must have the shape of query, got query {tuple(query.shape)} and key {tuple(key.shape)}."
        )
    if value.dim() != query.dim() or value.shape[0] != query.shape[0] or value.shape[2:] != query.shape[2:]:
        raise ValueError(
            "value must have the batch and spatial sizes of query, "
            f"got query {tuple(query.shape)} and value {tuple(value.shape)}."
        )
    if min(query.shape[1:]) < 1 or value.shape[1] < 1:
        raise ValueError(
            "channels and spatial sizes must be at least 1, "
            f"got query {tuple(query.shape)} and value {tuple(value.shape)}."
        )
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in _DTYPES:
        raise ValueError(
            "query, key and value must share one floating dtype out of fp16, bf16, fp32 and fp64, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    if not (query.device == key.device == value.device):
        raise ValueError(
            "query, key and value must be on one device, "
            f"got {query.device}, {key.device} and {value.device}."
        )
