"""`key=value` overrides of a LazyConfig that refuse keys nothing would read."""

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config
from ccnet_d2.wording import listed

_BOOLEANS_OF_YAML = ("yes", "no", "on", "off", "y", "n", "none")
"""Words that are text in an override, hence true, and mean a boolean to whoever writes them."""

_NUMBERS = (bool, int, float)
_MAY_BE_TEXT = (str, object, Any, Literal)
_SEVERAL = (tuple, list, Sequence)
_SINGLE = {*_NUMBERS, NoneType, torch.Tensor}


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
        UserError: an override is not `key=value`, its key is neither in the config nor an argument of the object it is
            given to, it is text or nothing in place of a number or a boolean, no list in place of one, a single value
            in place of a group, or it builds an object of another kind that does not take the arguments that are there.
    """
    before = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"Override {override!r} is not of the form key=value.")
        if not key.startswith("+"):
            _check_key(config, key)
            before[key] = copy.copy(_value_or_default(config, key))  # OmegaConf changes lists where they are
        _check_value(override)
    try:
        LazyConfig.apply_overrides(config, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError, KeyError) as error:
        raise UserError(
            f"Overrides {list(overrides)} cannot be applied: {str(error).splitlines()[0]}"
        ) from error
    for key in before:
        if key.endswith("._target_"):
            _check_target(config, key)
    for key, value in before.items():
        _check_kind(config, key, value)
    return config


def refuse_overridden(overrides: Sequence[str], setters: Mapping[str, str]) -> None:
    """Refuse overrides of keys that each of several runs gets from somewhere else.

    Args:
        overrides: such as "train.max_iter=20".
        setters: what sets a key for each run, such as {"train.seed": "--seed"}.

    Raises:
        UserError: one of the keys is overridden.
    """
    for override in overrides:
        name = override.partition("=")[0].lstrip("+")
        if name in setters:
            raise UserError(
                f"Override {override!r} has no effect, as {setters[name]} sets {name} for each run; leave it out."
            )


def _check_value(override: str) -> None:
    """Refuse what Hydra's grammar does not take, or takes for several values to be tried one after the other."""
    try:
        if not OverridesParser.create().parse_override(override).is_sweep_override():
            return
        reason = "it has several values"
    except HydraException as error:
        reason = str(error).splitlines()[0].removesuffix(f": {override}")
    key, _, value = override.partition("=")
    advice = ""
    if value.startswith("~"):
        advice = "; the shell leaves ~ as it is here: write $HOME instead"
    elif not value.startswith(("[", "{")) and not {"'", '"'} & set(value):
        advice = f"; a text of such characters takes quotes that the shell leaves: '{key}=\"{value}\"'"
    raise UserError(f"Override {override!r} cannot be applied: {reason}{advice}.")


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
        if depth == len(parts) - 1 and part in _names(_parameters(node)):
            return
        where = ".".join(parts[:depth]) or "the config"
        if not isinstance(node, DictConfig):
            raise UserError(f"Unknown key {key!r}: {where} has no keys.")
        known = sorted({str(k) for k in node} | _names(_parameters(node)))
        near = difflib.get_close_matches(part, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
        raise UserError(f"Unknown key {key!r}: {where} has no {part!r}; {hint}")


def _value(config: DictConfig, key: str) -> object:
    return OmegaConf.select(config, key, throw_on_resolution_failure=False)


def _value_or_default(config: DictConfig, key: str) -> object:
    """What an override changes: where the config does not say, the default of the argument."""
    value = _value(config, key)
    if value is not None:
        return value
    place, _, name = key.rpartition(".")
    return _default(_value(config, place), name)


def _check_kind(config: DictConfig, key: str, before: object) -> None:
    """Refuse what takes the place of a number, a boolean, a list or a group of values and is none, or nothing in that
    of an object, where it is seen late, or counts as true or false.

    Arguments of objects may well be of several kinds, but for those that are annotated as one alone, and for words that
    are no text to whoever writes them.
    """
    value = _value(config, key)
    place, _, name = key.rpartition(".")
    node = _value(config, place)
    object_node = node if isinstance(node, DictConfig) and "_target_" in node else None
    if isinstance(before, DictConfig) and object_node is None and "_target_" not in before:
        if before and not isinstance(value, DictConfig):
            raise UserError(
                f"{key}={_shown(value)} is no group of values, as {key} is one: change those in it by their own keys, "
                f"such as {key}.{next(iter(before))}."
            )
    elif isinstance(before, DictConfig) and object_node is not None and "_target_" in before:
        if value is None and _is_annotated(object_node, name) and not _may_be_none(object_node, name):
            raise UserError(f"{key}=null has to be an object: leave it as the config has it.")
    elif isinstance(before, (ListConfig, tuple)) and object_node is not None:
        wanted = _wanted_list(object_node, name, before, value)
        if wanted:
            raise UserError(f"{key}={_shown(value)} has to be {wanted}.")
    elif isinstance(before, _NUMBERS) and not _may_replace(object_node, name, before, value):
        wanted = "True or False" if isinstance(before, bool) else f"a number, such as {before}"
        null = ", or null for none" if isinstance(value, str) and value.lower() == "none" else ""
        raise UserError(f"{key}={_shown(value)} has to be {wanted}{null}.")


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)


def _may_replace(node: DictConfig | None, name: str, before: bool | int | float, value: object) -> bool:
    """Whether a value may take the place of a number or a boolean.

    Args:
        node: of the object that it is an argument of; None where it is none.
        name: of the argument.
        before: the number or boolean.
        value: what is to replace it.
    """
    flag = isinstance(before, bool)
    if node is None:
        # What holds no objects does not say whether a number may be left out.
        return isinstance(value, _NUMBERS) or not (flag or isinstance(value, str))
    if not _is_number(node, name):
        return not (flag and isinstance(value, str) and value.lower() in _BOOLEANS_OF_YAML)
    kinds = _kinds(node, name)
    if value is None:
        return _may_be_none(node, name)
    if isinstance(value, bool):
        return flag or bool in kinds
    if isinstance(value, (ListConfig, DictConfig)):
        return not set(map(_origin, kinds)) <= _SINGLE
    return not isinstance(value, str)


def _wanted_list(node: DictConfig, name: str, before: Sequence[Any], value: object) -> str | None:
    """What an argument that is annotated as several values, and as nothing else, has to be; None if it is that."""
    kinds = [kind for kind in _kinds(node, name) if kind is not NoneType]
    if not all(_origin(kind) in _SEVERAL for kind in kinds) or (value is None and _may_be_none(node, name)):
        return None
    plain = all(isinstance(entry, (*_NUMBERS, str)) for entry in before)
    example = f", such as {list(before)}" if before and plain else ""
    if not isinstance(value, ListConfig):
        return f"a list{example}"
    of_fixed_length = [
        get_args(kind) for kind in kinds if _origin(kind) is tuple and ... not in get_args(kind)
    ]
    # Detectron2 has Tuple[float] for any number of them.
    if [len(entries) for entries in of_fixed_length] == [len(before)] * len(kinds) and len(value) != len(
        before
    ):
        return f"a list of {len(before)}{example}"
    entries = [kind for several in kinds for entry in get_args(several) for kind in _alternatives(entry)]
    if _are_numbers(entries) and any(isinstance(entry, str) for entry in value):
        return f"a list of numbers{example}"
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _kinds(node: DictConfig, name: str) -> tuple[Any, ...]:
    """What the argument of this name is annotated as."""
    parameter = _parameter(node, name)
    return _alternatives(None if parameter is None else parameter.annotation)


def _is_annotated(node: DictConfig, name: str) -> bool:
    parameter = _parameter(node, name)
    return parameter is not None and parameter.annotation not in (parameter.empty, Any, object)


def _are_numbers(kinds: Sequence[Any]) -> bool:
    """Whether there are numbers or booleans among them, and nothing that text is."""
    may_be_text = any(_origin(kind) in _MAY_BE_TEXT for kind in kinds)
    return not may_be_text and any(kind in _NUMBERS for kind in kinds)


def _is_number(node: DictConfig, name: str) -> bool:
    """Whether the argument of this name is annotated as a number or a boolean, and as nothing that text is."""
    return _are_numbers(_kinds(node, name))


def _may_be_none(node: DictConfig, name: str) -> bool:
    """Whether it is annotated as None as well, which may also be told by its default."""
    return _default(node, name) is None or NoneType in _kinds(node, name)


def _check_target(config: DictConfig, key: str) -> None:
    """Refuse an object of another kind where arguments of the one before are left that it does not take."""
    place = key.removesuffix("._target_")
    node = _value(config, place)
    try:
        parameters = _parameters(node)
    except ImportError as error:
        raise UserError(f"{key}={_value(config, key)}: there is no such class or function.") from error
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    accepted = _names(parameters)
    left = [name for name in node if name != "_target_" and name not in accepted]
    if accepted and left:
        target = _value(config, key)
        raise UserError(
            f"{key}={target}: it takes no {listed(left)}, which {place} has; write a config file of your own, with "
            f"{place} = L({target})(...)."
        )


def _names(parameters: Sequence[inspect.Parameter]) -> set[str]:
    """Of those that an argument by name is taken for."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in named}


def _default(node: object, name: str) -> object:
    """Of the argument of this name; None where there is no such argument."""
    parameter = _parameter(node, name)
    return None if parameter is None else parameter.default


def _parameter(node: object, name: str) -> inspect.Parameter | None:
    return next((parameter for parameter in _parameters(node) if parameter.name == name), None)


def _parameters(node: object) -> Sequence[inspect.Parameter]:
    """Those of the object a LazyCall node builds; none of what is no such node, or does not tell them."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return ()
    target = OmegaConf.to_container(node, resolve=False)["_target_"]
    target = locate(target) if isinstance(target, str) else target
    try:
        return tuple(_signature(target).parameters.values())
    except (TypeError, ValueError):
        return ()


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except (NameError, AttributeError, SyntaxError):  # annotations of what is there for type checkers alone
        return inspect.signature(target)
