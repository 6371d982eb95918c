"""Detectron2's checkpointer, reading files as data, refusing weights that do not fit, and saving whole files only."""

import fnmatch
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ccnet_d2.atomic_file import atomic_write, atomic_write_text, disk_full_reported, remove_temporary_files
from ccnet_d2.errors import UserError
from ccnet_d2.wording import listed

from .safe_load import CheckpointError, check_weights, load_file

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"
_BY_HEURISTICS = "?matching_heuristics=True"
# The keys of a LazyConfig, and of a yacs config.
_STARTS_FROM = "train.init_checkpoint=PATH (MODEL.WEIGHTS PATH)"
_MAY_DIFFER = "train.init_may_differ (MODEL.CCNET.WEIGHTS_MAY_DIFFER)"


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that never runs code from a file, and leaves nothing half-done.

    Files and the tag `last_checkpoint` are written beside their place, synced and renamed. A weight of another shape
    is an error: Detectron2 skips it with a warning, which leaves it at its random start. So are integers for a
    floating-point parameter, as of a quantized network, which Detectron2 takes for its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        may_lack: Sequence[str] = ("*",),
        may_differ: Sequence[str] = (),
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: the model to load into.
            save_dir: where checkpoints are written.
            strict: refuse a checkpoint that lacks a weight or buffer of the model, as evaluation needs all of them.
            may_lack: patterns such as "sem_seg_head.*" of the names that a checkpoint may lack without `strict`.
            may_differ: patterns of the names that may be of another shape in it, and are then left as they are.
            allow_pickle: run the code of files that cannot be read without it.
            kwargs: as in `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict
        self.may_lack = tuple(may_lack)
        self.may_differ = tuple(may_differ)
        self.allow_pickle = allow_pickle
        self._by_heuristics = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth and then the tag that names it; what was there before stays until the new one is whole.

        Args:
            name: without the suffix.
            kwargs: plain data to save along.

        Raises:
            DiskFullError: there is no room; the earlier checkpoints and the tag are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update(
            (key, checkpointable.state_dict()) for key, checkpointable in self.checkpointables.items()
        )
        data.update(kwargs)
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        remove_temporary_files(self.save_dir, "*.pth")
        last = self.get_checkpoint_file() if self.has_checkpoint() else ""
        advice = f"the last checkpoint, {last}, is whole; make room and go on with --resume" if last else ""
        with disk_full_reported(self.save_dir, lambda: advice):
            with atomic_write(path) as file:
                torch.save(data, file)
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of the output directory the one that `--resume` goes on from."""
        atomic_write_text(Path(self.save_dir, _TAG), last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """The file that the tag `last_checkpoint` names; "" if there is no tag.

        Raises:
            CheckpointError: the tag does not hold the name of a file in its folder.
        """
        tag = Path(self.save_dir, _TAG)
        try:
            name = tag.read_text(errors="replace").strip()
        except FileNotFoundError:
            return ""
        if not name.isprintable() or not name or Path(name).name != name:
            raise CheckpointError(
                f"{tag} holds {name[:80]!r}, which is not the name of a checkpoint beside it; write into it the one "
                "to go on from."
            )
        return os.path.join(self.save_dir, name)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint with the state of the training, or, without one, the weights at `path`.

        Args:
            path: weights to start from; "" for none.
            resume: look for a last checkpoint.

        Raises:
            CheckpointError: the file cannot be read or does not fit. There is no falling back to an older one.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        last = self.get_checkpoint_file()
        try:
            if not os.path.isfile(last):
                raise CheckpointError(f"{Path(self.save_dir, _TAG)} names {last}, which is not there.")
            return self._load_strictly(last)
        except CheckpointError as error:
            others = [f for f in sorted(self.get_all_checkpoint_files(), key=os.path.getmtime) if f != last]
            if not others or not _is_unreadable(last):
                raise
            raise CheckpointError(
                f"{str(error).rstrip('.')}; to go on from an older one, such as {others[-1]}, write its name into "
                f"{Path(self.save_dir, _TAG)}."
            ) from error

    def _load_strictly(self, path: str) -> dict[str, Any]:
        strict, may_differ, allow_pickle = self.strict, self.may_differ, self.allow_pickle
        self.strict, self.may_differ, self.allow_pickle = True, (), False
        try:
            return self.load(path)
        finally:
            self.strict, self.may_differ, self.allow_pickle = strict, may_differ, allow_pickle

    def load(self, path: str, checkpointables: Iterable[str] | None = None) -> dict[str, Any]:
        """Load a file into the model and, unless `checkpointables` says otherwise, into all that is saved with it.

        Args:
            path: a file or address; with "?matching_heuristics=True" behind it, which only newer versions of Detectron2
                know by themselves, names are matched by their ends, as for weights of a backbone alone.
            checkpointables: names of what else to load; default: all.

        Returns:
            What else is in the file.

        Raises:
            CheckpointError: the file cannot be had or read, or does not fit the model.
        """
        path = os.path.expanduser(os.fspath(path or ""))
        self._by_heuristics = path.endswith(_BY_HEURISTICS)
        try:
            rest = super().load(path.removesuffix(_BY_HEURISTICS), checkpointables=[])
        except UserError:
            raise
        except (OSError, URLError, AssertionError, RuntimeError) as error:
            # Of RuntimeErrors, that Detectron2's catalog lacks an entry.
            if isinstance(error, RuntimeError) and "catalog" not in str(error):
                raise
            reason = str(error).rstrip(".")
            if isinstance(error, AssertionError):
                is_folder = os.path.isdir(path.removesuffix(_BY_HEURISTICS))
                reason = "it is a folder" if is_folder else "there is no such file"
            raise CheckpointError(
                f"Checkpoint {path} cannot be had: {reason}; name a local file"
                + ("." if self.strict else f" with {_STARTS_FROM}, or '' there to start from random weights.")
            ) from error
        finally:
            # Newer versions of Detectron2 leave it behind where they fail, and then refuse to load anything.
            self._parsed_url_during_load = None
        if path:
            _warn_of_non_finite(self.model, path)
        for key in self.checkpointables if checkpointables is None and path else checkpointables or ():
            if key not in rest:
                raise CheckpointError(
                    f"Checkpoint {path} holds no {key!r}, only weights: a run cannot be resumed from it; start a new "
                    f"one from the weights with train.init_checkpoint={path}."
                )
            self._load_state(key, rest.pop(key), path)
        return rest

    def _load_state(self, key: str, state: Any, path: str) -> None:
        try:
            self.checkpointables[key].load_state_dict(state)
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise CheckpointError(
                f"The state {key!r} in checkpoint {path} does not fit this run: {reason.rstrip('.')}."
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = load_file(filename, allow_pickle=self.allow_pickle)
        if not isinstance(data, dict):
            raise CheckpointError(
                f"Checkpoint {filename} holds a {type(data).__name__} instead of a state dict."
            )
        data = _with_model(data, filename)
        if self._by_heuristics:
            data["matching_heuristics"] = True
        check_weights(data["model"], filename)
        return data

    def _load_model(self, checkpoint: dict[str, Any]):
        try:
            return super()._load_model(checkpoint)
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"The checkpoint does not fit the model: {str(error).splitlines()[0]}"
            ) from error

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        super()._convert_ndarray_to_tensor(state_dict)
        # The names are those of the model now, but for what DataParallel put before them.
        for name, parameter in self.model.named_parameters():
            found = state_dict.get(name, state_dict.get(f"module.{name}"))
            if found is None or found.is_floating_point() or not parameter.is_floating_point():
                continue
            if found.shape == parameter.shape:  # another shape is told of later
                raise CheckpointError(
                    f"The checkpoint does not fit the model: {name} is of {found.dtype} there and of {parameter.dtype} "
                    "in the model; take the weights as they were before quantization."
                )

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = [entry for entry in incompatible.incorrect_shapes if not _matches(entry[0], self.may_differ)]
        if wrong:
            name, found, wanted = wrong[0]
            advice = "" if self.strict else f", or name what may differ in {_MAY_DIFFER}"
            raise CheckpointError(
                f"The checkpoint does not fit the model: {name} has shape {tuple(found)} there and {tuple(wanted)} "
                f"in the model{f', and {len(wrong) - 1} more differ' if len(wrong) > 1 else ''}; check that config "
                f"and checkpoint belong together{advice}."
            )
        if {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise CheckpointError(
                "The checkpoint does not fit the model: no parameter has the name of one in it; weights of another "
                "code base have to be converted first, with projects/CCNet/tools/convert_checkpoint.py."
            )
        # What was left out for its shape, Detectron2 counts as missing as well.
        other_shape = {entry[0] for entry in incompatible.incorrect_shapes}
        may_lack = () if self.strict else self.may_lack
        # A batch norm that was frozen in training has no counter, and none computes with it.
        missing = sorted(
            key
            for key in incompatible.missing_keys
            if key not in other_shape
            and not _matches(key, may_lack)
            and not key.endswith("num_batches_tracked")
        )
        if missing:
            advice = "" if self.strict else "; name what may be missing in train.init_may_lack"
            raise CheckpointError(
                f"The checkpoint does not fit the model: it lacks {listed(missing, 3)}{advice}."
            )
        super()._log_incompatible_keys(incompatible)


def load_checkpoint(
    model: nn.Module, path: str | Path, *, strict: bool = True, allow_pickle: bool = False
) -> None:
    """Load the weights of a checkpoint into a model, in place.

    Args:
        model: any Detectron2 model.
        path: a file, or a URL known to Detectron2 such as "detectron2://…".
        strict: refuse a checkpoint that lacks a parameter of the model.
        allow_pickle: run the code of a file that cannot be read without it.

    Raises:
        CheckpointError: the file cannot be had or read, or does not fit the model.
    """
    if not str(path):
        raise CheckpointError("No checkpoint given: name one with train.init_checkpoint=PATH.")
    SafeCheckpointer(model, strict=strict, allow_pickle=allow_pickle).load(str(path), checkpointables=[])


def _warn_of_non_finite(model: nn.Module, path: str) -> None:
    """Log which tensors a file filled with NaN or Inf, which a network answers with NaN, that is, with any label."""
    tensors = model.state_dict()
    broken = [
        name
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        logger.warning(
            "With checkpoint %s, %d of the model's %d tensors hold NaN or Inf: %s. What it computes will be of no "
            "use; take an earlier checkpoint.",
            path,
            len(broken),
            len(tensors),
            listed(broken, 3),
        )


def _with_model(data: dict[str, Any], filename: str) -> dict[str, Any]:
    """The contents of a file of any known kind, with the weights under "model"."""
    if filename.endswith(".pkl"):
        return _model_zoo_format(data)
    if filename.endswith(".pyth"):
        if "model_state" not in data:
            raise CheckpointError(f"Checkpoint {filename} has no 'model_state', which pycls files have.")
        return {"model": data["model_state"], "__author__": "pycls", "matching_heuristics": True}
    return data if "model" in data else {"model": data}


def _model_zoo_format(data: dict[str, Any]) -> dict[str, Any]:
    if "model" in data:
        return data
    blobs = data.get("blobs", data)  # detection models of Caffe2 have "blobs", ImageNet models do not
    if not isinstance(blobs, dict):
        return {"model": blobs}
    weights = {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_unreadable(path: str) -> bool:
    try:
        load_file(path)
    except CheckpointError:
        return True
    return False
