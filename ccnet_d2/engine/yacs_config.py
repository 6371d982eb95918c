"""Reading yacs (.yaml) configs."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import config_path
from ccnet_d2.modeling import add_ccnet_config
from ccnet_d2.wording import first_line

__all__ = ["load_config"]

_GROUP_AS_VALUE = re.compile(r" with values \(.*\n.*\)(?= for config key: )", re.DOTALL)


def load_config(name: str, options: Sequence[str] = ()) -> CfgNode:
    """A yacs config with CCNet's keys.

    Args:
        name: a path, or a name relative to the project's configs, such as "yacs/toy/ccnet_synthetic.yaml".
        options: KEY VALUE pairs that change it, as one flat list.

    Raises:
        UserError: there is no such file, it cannot be read as data, or a key or value is wrong.
    """
    path = config_path(name)
    cfg = get_cfg()
    add_ccnet_config(cfg)
    # yacs tells wrong keys and values by exceptions of several kinds.
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        if isinstance(error, (KeyError, yaml.constructor.ConstructorError)) and _is_record_of_a_run(path):
            raise UserError(
                f"Config {path} is the record of a LazyConfig run, which is not run from it: give the .py file that "
                "the run was made from, and its overrides."
            ) from error
        raise UserError(f"Config {path} cannot be used: {_reason(error)}") from error
    except FileNotFoundError as error:
        raise UserError(
            f"Config {path} cannot be used: its _BASE_ {error.filename} does not exist."
        ) from error
    except OSError as error:  # of a web address, too
        raise UserError(
            f"Config {path} cannot be used: it, or its _BASE_, cannot be read: {error}."
        ) from error
    except RecursionError as error:
        raise UserError(
            f"Config {path} cannot be used: its _BASE_ leads back to the file that names it; name the config that it "
            "changes."
        ) from error
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"Config {path} cannot be used: it, or its _BASE_, does not hold groups of keys with values, such as "
            "'SOLVER: {MAX_ITER: 100}'."
        ) from error
    if len(options) % 2:
        raise UserError(
            f"Options of a .yaml config are KEY VALUE pairs, but there are {len(options)}: {list(options)}."
        )
    try:
        cfg.merge_from_list(list(options))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"Options {list(options)} cannot be applied: {_reason(error)}") from error
    return cfg


def _is_record_of_a_run(path: Path) -> bool:
    """Whether the file is the config.yaml that a LazyConfig run leaves in its output directory."""
    # Some records name Python objects, which are data that nothing here constructs.
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return isinstance(root, yaml.MappingNode) and {"model", "dataloader", "train"} <= {
        key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)
    }


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} of {error.problem_mark.name}: {error.problem}."
    # str() of a KeyError is its argument in quotes.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # A group of keys, which yacs writes out on lines of its own, leaves the key that is wrong for the last line.
    message = _GROUP_AS_VALUE.sub("", message)
    return (first_line(message) or type(error).__name__) + "."
