"""The tensors of a published checkpoint, whatever wraps them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccnet_d2.checkpoint.safe_load import CheckpointError, is_dense, load_file

# Where training codes put the state dict: mmsegmentation and many others, Detectron2 and the official code, pycls.
_WRAPPERS = ("state_dict", "model", "model_state")
# What DataParallel and DistributedDataParallel put before every name.
_PREFIX = "module."


def read_weights(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The state dict in a file, read as data, without `module.` before its names.

    Args:
        path: a file of torch.
        allow_pickle: run the code in it, see `load_file`; only for files of somebody you trust.

    Returns:
        Tensors by name, on the CPU and apart from any graph; floating-point numbers as fp32.

    Raises:
        CheckpointError: the file cannot be read or wants code to run, or holds no state dict.
    """
    return unwrap(load_file(path, allow_pickle=allow_pickle), str(path))


def unwrap(data: Any, where: str) -> dict[str, Tensor]:
    """The state dict within the contents of a file; `where` names the file in errors.

    Raises:
        CheckpointError: there is none, it is empty, or it holds something else than dense tensors, finite in fp32.
    """
    if isinstance(data, Mapping):
        for key in _WRAPPERS:
            if isinstance(data.get(key), Mapping):
                data = data[key]
                break
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where} holds a {type(data).__name__} instead of a state dict.")
    weights = {}
    for name, value in data.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{where} is not a state dict: {name!r}, of type {type(name).__name__}, names no tensor."
            )
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where} is not a state dict: its entry {name!r} is a {type(value).__name__}, not a tensor."
            )
        if not is_dense(value):
            raise CheckpointError(
                f"{where} cannot be converted: {name} is sparse, quantized or without values; save its weights as "
                "dense tensors."
            )
        value = value.detach()
        if value.is_floating_point():
            value = value.float()
            if not torch.isfinite(value).all():
                raise CheckpointError(f"{where} is damaged: {name} holds values that are not finite.")
        weights[name] = value
    if not weights:
        raise CheckpointError(f"{where} holds no weights.")
    while all(name.startswith(_PREFIX) for name in weights):
        weights = {name[len(_PREFIX) :]: value for name, value in weights.items()}
    return weights
