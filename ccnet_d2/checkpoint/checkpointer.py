"""Detectron2's checkpointer, reading files as data and refusing weights that do not fit."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .safe_load import CheckpointError, load_file


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that never runs code from a file, and where a weight of another shape is an error.

    Detectron2 skips such weights with a warning, which leaves them at their random start.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, strict: bool = False, **kwargs: Any) -> None:
        """
        Args:
            model: the model to load into.
            save_dir: where checkpoints are written.
            strict: also refuse a checkpoint that lacks a parameter of the model, as evaluation needs all of them.
            kwargs: as in `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Raises:
            CheckpointError: the file cannot be had or read, or does not fit the model.
        """
        try:
            return super().load(path, *args, **kwargs)
        except CheckpointError:
            raise
        except (OSError, URLError, AssertionError) as error:
            raise CheckpointError(
                f"Checkpoint {path} cannot be had: {error}; name a local file with train.init_checkpoint=PATH, or "
                "train.init_checkpoint='' to start from random weights."
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = load_file(filename)
        if not isinstance(data, dict):
            raise CheckpointError(
                f"Checkpoint {filename} holds a {type(data).__name__} instead of a state dict."
            )
        if filename.endswith(".pkl"):
            return _model_zoo_format(data)
        if filename.endswith(".pyth"):
            if "model_state" not in data:
                raise CheckpointError(f"Checkpoint {filename} has no 'model_state', which pycls files have.")
            return {"model": data["model_state"], "__author__": "pycls", "matching_heuristics": True}
        return data if "model" in data else {"model": data}

    def _log_incompatible_keys(self, incompatible) -> None:
        if incompatible.incorrect_shapes:
            name, found, wanted = incompatible.incorrect_shapes[0]
            more = len(incompatible.incorrect_shapes) - 1
            raise CheckpointError(
                f"The checkpoint does not fit the model: {name} has shape {tuple(found)} there and {tuple(wanted)} "
                f"in the model{f', and {more} more differ' if more else ''}; check that config and checkpoint "
                "belong together."
            )
        if {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise CheckpointError(
                "The checkpoint does not fit the model: no parameter has the name of one in it."
            )
        if self.strict and incompatible.missing_keys:
            keys = incompatible.missing_keys
            raise CheckpointError(
                f"The checkpoint does not fit the model: it lacks {', '.join(sorted(keys)[:3])}"
                f"{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}."
            )
        super()._log_incompatible_keys(incompatible)


def load_checkpoint(model: nn.Module, path: str | Path, *, strict: bool = True) -> None:
    """Load the weights of a checkpoint into a model, in place.

    Args:
        model: any Detectron2 model.
        path: a file, or a URL known to Detectron2 such as "detectron2://…".
        strict: refuse a checkpoint that lacks a parameter of the model.

    Raises:
        CheckpointError: the file cannot be had or read, or does not fit the model.
    """
    if not str(path):
        raise CheckpointError("No checkpoint given: name one with train.init_checkpoint=PATH.")
    SafeCheckpointer(model, strict=strict).load(str(path), checkpointables=[])


def _model_zoo_format(data: dict[str, Any]) -> dict[str, Any]:
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)  # detection models of Caffe2 have "blobs", ImageNet models do not
    weights = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
