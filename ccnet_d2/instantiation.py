"""The objects of a run, built by Detectron2's `instantiate`, with one sentence for those that cannot be."""

import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ccnet_d2.errors import ARGUMENT_FAULTS, UserError
from ccnet_d2.wording import first_line

__all__ = ["build_object", "build_value"]

_FAULTS = (*ARGUMENT_FAULTS, ImportError)
"""What wrong arguments lead to. Others, such as torch's for memory that ran out, are not of the config."""

_VALUES = (bool, int, float, str, type(None), list, dict, ListConfig, DictConfig)


def build_object(cfg: DictConfig, key: str) -> Any:
    """Build the object that a run has to have at a key.

    Args:
        cfg: the run.
        key: such as "model" or "dataloader.test".

    Returns:
        What `instantiate` makes of it.

    Raises:
        UserError: there is no object, or it, or one of those it is made of, cannot be built.
    """
    node = OmegaConf.select(cfg, key)
    if isinstance(node, _VALUES) and not _is_call(node):
        shown = "null" if node is None else node
        raise UserError(
            f"{key}={shown} builds no object, which the run needs there: leave it as the config has it, or write "
            "L(...)(...) in a config file."
        )
    return build_value(node, key)


def build_value(value: Any, key: str) -> Any:
    """Build a value of a run that may be an object, as `instantiate` does.

    Args:
        value: of the config.
        key: its name there.

    Raises:
        UserError: it, or an object in it, cannot be built; the message names the key of the innermost one, and with an
            error that is not meant for users the line it came from. The error is the cause.
    """
    if isinstance(value, ListConfig):
        built = [build_value(value[index], f"{key}.{index}") for index in range(len(value))]
        return ListConfig(built, flags={"allow_objects": True})
    if isinstance(value, list):
        return [build_value(entry, f"{key}.{index}") for index, entry in enumerate(value)]
    if not _is_call(value):
        return value
    target = value["_target_"]
    arguments = {
        name: build_value(argument, f"{key}.{name}") for name, argument in value.items() if name != "_target_"
    }
    try:
        return instantiate({"_target_": target, **arguments})
    except (UserError, FileNotFoundError):  # which say more than this can
        raise
    except _FAULTS as error:
        raise UserError(f"{key} cannot be built: {_reason(error, target, arguments)}") from error


def _is_call(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _reason(error: BaseException, target: Any, arguments: Mapping[str, Any]) -> str:
    misfit = _misfit(target, arguments) if isinstance(error, TypeError) else None
    if misfit is not None:
        return f"{_name(target)} {misfit}."
    text = first_line(error)
    if isinstance(error, ValueError) and text:
        return f"{text}."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    kind = type(error).__name__
    return f"{kind}{f': {text}' if text else ''} ({where}; CCNET_TRACEBACK=1 prints the traceback)."


def _misfit(target: Any, arguments: Mapping[str, Any]) -> str | None:
    """How arguments do not fit a signature; None where they do."""
    target = locate(target) if isinstance(target, str) else target
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return str(error)
    return None


def _name(target: Any) -> str:
    return (
        target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__qualname__", str(target))
    )
