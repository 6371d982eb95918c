"""`key=value` overrides of a LazyConfig that refuse keys nothing would read."""

import difflib
import inspect
from collections.abc import Sequence

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config


def load_run(name: str, overrides: Sequence[str]) -> DictConfig:
    """The run of this name or file, as `get_config` takes it, with overrides applied.

    Raises:
        UserError: as `get_config` and `apply_overrides` do.
    """
    return apply_overrides(get_config(name), overrides)


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply `key=value` overrides; a leading `+` adds a key that is not there.

    Args:
        config: the run.
        overrides: such as "train.max_iter=20".

    Returns:
        The changed config.

    Raises:
        UserError: an override is not `key=value`, or its key is neither in the config nor an argument of the object
            it is given to.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"Override {override!r} is not of the form key=value.")
        if not key.startswith("+"):
            _check_key(config, key)
    try:
        return LazyConfig.apply_overrides(config, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError, KeyError) as error:
        raise UserError(
            f"Overrides {list(overrides)} cannot be applied: {str(error).splitlines()[0]}"
        ) from error


def _check_key(config: DictConfig, key: str) -> None:
    node = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
            continue
        if isinstance(node, DictConfig) and part in node:
            node = node._get_node(part) if depth == len(parts) - 1 else node[part]
            continue
        if depth == len(parts) - 1 and part in _accepted_arguments(node):
            return
        where = ".".join(parts[:depth]) or "the config"
        if not isinstance(node, DictConfig):
            raise UserError(f"Unknown key {key!r}: {where} has no keys.")
        known = sorted({str(k) for k in node} | _accepted_arguments(node))
        near = difflib.get_close_matches(part, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
        raise UserError(f"Unknown key {key!r}: {where} has no {part!r}; {hint}")


def _accepted_arguments(node: object) -> set[str]:
    """Names of the arguments that the object a LazyCall node builds would take."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return set()
    target = OmegaConf.to_container(node, resolve=False)["_target_"]
    target = locate(target) if isinstance(target, str) else target
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in named}
