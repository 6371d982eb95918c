"""Writing checkpoints in the formats of Detectron2's model zoo."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ccnet_d2.atomic_file import atomic_write, disk_full_reported
from ccnet_d2.checkpoint.safe_load import CheckpointError


def write_checkpoint(weights: Mapping[str, Tensor], path: str | Path, author: str) -> None:
    """Write `{"model": weights, "__author__": author}`, whole or not at all.

    Args:
        weights: tensors by name.
        path: a `.pth` file of torch, or a `.pkl` file of numpy arrays; its folder is made if there is none.
        author: where the weights come from.

    Raises:
        CheckpointError: another suffix, or the file cannot be written.
        DiskFullError: there is no room for it.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pkl"):
        raise CheckpointError(f"{path} is neither a .pth nor a .pkl file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_reported(path.parent), atomic_write(path) as file:
            if path.suffix == ".pkl":
                arrays = {name: value.numpy() for name, value in weights.items()}
                pickle.dump({"model": arrays, "__author__": author}, file, protocol=4)
            else:
                torch.save({"model": dict(weights), "__author__": author}, file)
    except (OSError, RuntimeError) as error:  # of the latter kind are those of torch
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
