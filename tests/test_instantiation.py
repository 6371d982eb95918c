"""Objects of a run that cannot be built are one sentence, which names the key."""

import re

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ccnet_d2.errors import UserError
from ccnet_d2.instantiation import build_object, build_value


class Part:
    def __init__(self, size, *, kind="plain"):
        if kind == "own words":
            raise UserError("Parts are plain.")
        if kind not in ("plain", None):
            raise ValueError(f"kind is {kind}.\nIt has to be plain")
        if size == 13:
            raise AssertionError  # as of an assert in a library: without a word
        self.size, self.kind = size + 0, kind


class Whole:
    def __init__(self, parts=(), options=None):
        self.parts, self.options = parts, options


def fails():
    return {}["gone"]


def needs_a_package():
    import a_package_that_is_not_there  # noqa: F401


def take_all(**arguments):
    return arguments.pop("size") + 1


def config(**parts):
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.size = 4
    cfg.whole = L(Whole)(
        parts=[L(Part)(size="${size}"), L(Part)(size=2)], options={"deep": [1, L(Part)(size=3)]}
    )
    cfg.whole.update(parts)
    return cfg


def test_objects_are_those_of_detectron2():
    cfg = config()
    ours, theirs = build_object(cfg, "whole"), instantiate(cfg.whole)
    assert type(ours) is type(theirs) is Whole and type(ours.parts) is type(theirs.parts) is ListConfig
    assert [part.size for part in ours.parts] == [part.size for part in theirs.parts] == [4, 2]
    # Neither looks into groups that are no objects.
    assert ours.options == theirs.options and "_target_" in ours.options.deep[1]
    assert build_object(config(), "whole.parts.0").size == 4


def test_values_are_taken_as_they_are():
    part = Part(1)
    assert build_value(part, "part") is part
    assert build_value([L(Part)(size=5), 3, None], "parts")[0].size == 5
    assert build_value(OmegaConf.create({"a": 1}), "group") == {"a": 1}
    assert build_value(L(take_all)(size=2, other=3), "all") == 3
    cfg = OmegaConf.create({"part": part}, flags={"allow_objects": True})
    assert build_object(cfg, "part") is part


def test_targets_by_name():
    assert build_object(OmegaConf.create({"a": {"_target_": f"{__name__}.Part", "size": 1}}), "a").size == 1
    with pytest.raises(UserError, match=r"^a cannot be built: Part missing a required argument: 'size'\.$"):
        build_object(OmegaConf.create({"a": {"_target_": f"{__name__}.Part"}}), "a")
    with pytest.raises(UserError, match=r"^a cannot be built: ImportError: .*nowhere"):
        build_object(OmegaConf.create({"a": {"_target_": "nowhere.Part"}}), "a")


@pytest.mark.parametrize("value", [None, 5, True, "text", [1], {"size": 1}])
def test_values_in_place_of_an_object(value):
    shown = re.escape("null" if value is None else str(value))
    with pytest.raises(UserError, match=f"^part={shown} builds no object, which the run needs there"):
        build_object(OmegaConf.create({"part": value}), "part")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (L(Part)(size=1, kind="round"), "whole.parts.1 cannot be built: kind is round."),
        (
            L(Part)(size=1, colour=2),
            "whole.parts.1 cannot be built: Part got an unexpected keyword argument 'colour'.",
        ),
        (L(Part)(kind="plain"), "whole.parts.1 cannot be built: Part missing a required argument: 'size'."),
        (
            L(Part)(size="1"),
            'whole.parts.1 cannot be built: TypeError: can only concatenate str (not "int") to str (test_instantiation.'
            "py, line LINE; CCNET_TRACEBACK=1 prints the traceback).",
        ),
        (
            L(Part)(size=13),
            "whole.parts.1 cannot be built: AssertionError (test_instantiation.py, line LINE; CCNET_TRACEBACK=1 prints "
            "the traceback).",
        ),
        (L(fails)(), "whole.parts.1 cannot be built: KeyError: 'gone' (test_instantiation.py, line LINE; "),
        (
            L(needs_a_package)(),
            "whole.parts.1 cannot be built: ModuleNotFoundError: No module named 'a_package_that_is_not_there' (",
        ),
        (
            L(take_all)(size=None),
            "whole.parts.1 cannot be built: TypeError: unsupported operand type(s) for +: ",
        ),
        (L(Part)(size=L(Part)(size=2, kind=3)), "whole.parts.1.size cannot be built: kind is 3."),
    ],
)
def test_the_innermost_object_at_fault_is_named(part, reason):
    with pytest.raises(UserError) as error:
        build_object(config(parts=[L(Part)(size=1), part]), "whole")
    message = re.sub(r"line \d+", "line LINE", str(error.value))
    assert message.startswith(reason)
    assert error.value.__cause__ is not None and "\n" not in message


def test_what_says_itself_what_to_do_is_left_alone():
    with pytest.raises(UserError, match=r"^Parts are plain\.$"):
        build_object(config(parts=[L(Part)(size=1, kind="own words")]), "whole")
    with pytest.raises(FileNotFoundError):
        build_value(L(open)(file="not there"), "file")
    with pytest.raises(OmegaConfBaseException, match=r"full_key: whole.parts\[0\].size"):
        build_object(config(parts=[L(Part)(size="${nothing}")]), "whole")


def test_what_is_no_fault_of_arguments_passes():
    def out_of_memory():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        build_value(L(out_of_memory)(), "model")
