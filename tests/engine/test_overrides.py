"""Overrides: what is there can be changed, what nothing would read is refused by name."""

import re
from collections.abc import Sequence
from typing import Literal

import pytest
from detectron2.config import LazyCall as L
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.optim import SGD, AdamW

from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config


def config():
    return OmegaConf.create(
        {
            "model": L(nn.Conv2d)(in_channels=3, out_channels=4, kernel_size=1, bias=True),
            "optimizer": L(SGD)(lr=0.01),
            "train": {"max_iter": 10, "amp": {"enabled": False}},
            "steps": [{"size": 1}, {"size": 2}],
        },
        flags={"allow_objects": True},
    )


def test_values_change():
    cfg = apply_overrides(config(), ["train.max_iter=20", "train.amp.enabled=True", "model.out_channels=8"])
    assert cfg.train.max_iter == 20 and cfg.train.amp.enabled is True and cfg.model.out_channels == 8


@pytest.mark.parametrize("value", ["wörter", "epoch=3.pth", "run(1)/x.pth", "a,b", "a#b"])
def test_text_that_needs_quotes_is_told_so_and_how(value):
    """As names of files may; Hydra's lexer says that it has no viable alternative."""
    other = "train.amp.enabled=True"
    with pytest.raises(UserError, match="quotes") as told:
        apply_overrides(config(), [other, f"+train.note={value}"])
    assert other not in str(told.value)
    (quoted,) = re.findall(r"leaves: '(.*)'\.$", str(told.value))
    assert apply_overrides(config(), [quoted]).train.note == value


def test_a_home_that_the_shell_left_is_told():
    with pytest.raises(UserError, match=r"'\+train.note=~/x' cannot be applied: .*write \$HOME instead\.$"):
        apply_overrides(config(), ["+train.note=~/x"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.amp.enabled=no", "train.amp.enabled='no' has to be True or False."),
        ("train.amp.enabled=maybe", "train.amp.enabled='maybe' has to be True or False."),
        ("model.bias=Off", "model.bias='Off' has to be True or False."),
        ("train.max_iter=ten", "train.max_iter='ten' has to be a number, such as 10."),
        ("train.max_iter=None", "train.max_iter='None' has to be a number, such as 10, or null for none."),
        ("model.out_channels=four", "model.out_channels='four' has to be a number, such as 4."),
        ("model.bias=all", "model.bias='all' has to be True or False."),
        ("model.dilation=two", "model.dilation='two' has to be a number, such as 1."),  # its default
        ("optimizer.lr=1e-3x", "optimizer.lr='1e-3x' has to be a number, such as 0.01."),
        ("optimizer.nesterov=no", "optimizer.nesterov='no' has to be True or False."),
    ],
)
def test_text_is_no_boolean_and_no_number(override, message):
    """ "no" and "off" counted as true, as any text does; numbers ended in a traceback where they were needed."""
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        apply_overrides(config(), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=null", "optimizer.lr=null has to be a number, such as 0.01."),
        ("optimizer.momentum=null", "optimizer.momentum=null has to be a number, such as 0"),  # its default
        ("model.out_channels=null", "model.out_channels=null has to be a number, such as 4."),
        ("adam.betas=x", "adam.betas='x' has to be a list, such as [0.9, 0.999]."),
        ("adam.betas=0.9", "adam.betas=0.9 has to be a list, such as [0.9, 0.999]."),
        ("adam.betas=null", "adam.betas=null has to be a list, such as [0.9, 0.999]."),
        ("said.betas=0.5", "said.betas=0.5 has to be a list, such as [0.8, 0.9]."),
        # OmegaConf changes the list that was there, so that it had the length and the text of the new one.
        ("said.betas=[0.9]", "said.betas=[0.9] has to be a list of 2, such as [0.8, 0.9]."),
        ("said.betas=[0.9,x]", "said.betas=[0.9, 'x'] has to be a list of numbers, such as [0.8, 0.9]."),
        ("adam.betas=[0.9]", "adam.betas=[0.9] has to be a list of 2, such as [0.9, 0.999]."),
        ("adam.betas=[0.9,x]", "adam.betas=[0.9, 'x'] has to be a list of numbers, such as [0.9, 0.999]."),
        ("optimizer.lr=[0.1]", "optimizer.lr=[0.1] has to be a number, such as 0.01."),
        ("optimizer.lr={a: 1}", "optimizer.lr={'a': 1} has to be a number, such as 0.01."),
    ],
)
def test_nothing_is_no_number_and_one_value_is_no_list(override, message):
    """An optimizer compared them with numbers, which ended in a traceback."""
    cfg = config()
    cfg.adam, cfg.said = L(AdamW)(lr=0.1), L(AdamW)(lr=0.1, betas=[0.8, 0.9])
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        apply_overrides(cfg, [override])


def test_nothing_and_one_value_where_they_may_be():
    cfg = config()
    cfg.layer, cfg.adam = L(layer)(said=1), L(AdamW)(lr=0.1)
    overrides = ["layer.unsaid=null", "layer.number_or_none=null", "layer.none_by_default=null"]
    overrides += [
        "layer.unsaid_list=3",
        "layer.one_or_two=3",
        "layer.unsaid_flag=null",
        "train.max_iter=null",
    ]
    overrides += ["layer.list_or_none=null", "layer.any_list=[1,2,3]", "model.kernel_size=[1,3]"]
    overrides += ["layer.said_to_be_one=[1,2]"]
    changed = apply_overrides(cfg, [*overrides, "adam.betas=[0.5,0.6]", "adam.foreach=null"])
    assert changed.layer.number_or_none is None and changed.layer.one_or_two == 3
    assert changed.adam.betas == [0.5, 0.6] and changed.layer.any_list == [1, 2, 3]
    assert changed.model.kernel_size == [1, 3] and changed.layer.list_or_none is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.nesterov=null", "optimizer.nesterov=null has to be True or False."),
        ("model.bias=null", "model.bias=null has to be True or False."),  # its default is True
        ("train.amp.enabled=null", "train.amp.enabled=null has to be True or False."),
        ("optimizer.lr=true", "optimizer.lr=True has to be a number, such as 0.01."),
        (
            "train.amp=True",
            "train.amp=True is no group of values, as train.amp is one: change those in it by their own keys, such as "
            "train.amp.enabled.",
        ),
        ("train=null", "train=null is no group of values"),
    ],
)
def test_what_would_pass_for_another_value_without_a_word(override, message):
    """null counted as false, true as 1, and a run with `train.amp=True` trained in fp32."""
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        apply_overrides(config(), [override])


def test_flags_and_groups_that_are_replaced_by_such():
    cfg = config()
    cfg.layer, cfg.empty = L(layer)(said=1, group={"a": 1}), {}
    overrides = ["train.amp.enabled=1", "train.amp={enabled: True}", "layer.flag_or_none=null"]
    # Objects, and arguments of objects, may be left out.
    overrides += ["layer.group=null", "optimizer=null", "empty=1"]
    changed = apply_overrides(cfg, overrides)
    assert changed.train.amp.enabled is True and changed.layer.flag_or_none is None
    assert changed.layer.group is None and changed.optimizer is None and changed.empty == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("said.size=x", "said.size='x' has to be a number, such as 4."),
        ("said.size=null", "said.size=null has to be a number, such as 4."),
        ("said.pairs=3", "said.pairs=3 has to be a list, such as [1, 2]."),
        ("said.pairs=null", "said.pairs=null has to be a list, such as [1, 2]."),
    ],
)
def test_annotations_that_are_text_count_as_others(override, message):
    """As in every module with `from __future__ import annotations`."""
    cfg = config()
    cfg.said = L(annotated_by_text)()
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        apply_overrides(cfg, [override])


def test_annotations_of_names_that_are_not_there_say_nothing():
    cfg = config()
    cfg.unknown = L(annotated_for_type_checkers)()
    assert apply_overrides(cfg, ["unknown.size=x"]).unknown.size == "x"


def test_nothing_in_place_of_an_object_that_has_to_be_there():
    cfg = config()
    cfg.whole = L(made_of)(needed=L(layer)(said=1), spare=L(layer)(said=2), unsaid=L(layer)(said=3))
    assert apply_overrides(cfg, ["whole.spare=null", "whole.unsaid=null"]).whole.spare is None
    message = "whole.needed=null has to be an object: leave it as the config has it."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        apply_overrides(cfg, ["whole.needed=null"])


def made_of(unsaid, *, needed: nn.Module, spare: nn.Module | None):
    """A module of others, as a model is of its backbone and head."""


def annotated_by_text(size: "int" = 4, pairs: "Sequence[int]" = (1, 2)):
    """As a module with postponed annotations has its functions."""


def annotated_for_type_checkers(size: "int" = 4, other: "Missing" = None):  # noqa: F821
    """With a name that only a type checker imports."""


def layer(
    said: int | Literal["auto"],
    unsaid=1,
    unsaid_flag=True,
    number_or_none: float | None = 1.0,
    none_by_default: int = None,  # noqa: RUF013 - as older code has it
    flag: bool = True,
    unsaid_list=(1, 2),
    one_or_two: int | tuple[int, int] = (1, 2),
    flag_or_none: bool | None = True,
    list_or_none: Sequence[int] | None = (1, 2),
    any_list: tuple[int, ...] = (1, 2),
    said_to_be_one: tuple[float] = (1.0, 2.0, 3.0),  # as Detectron2 has pixel_mean
    group: dict | None = None,
):
    """An object whose arguments may be of several kinds, or do not say."""


@pytest.mark.parametrize("key", ["said", "unsaid", "unsaid_flag"])
def test_arguments_may_be_text_in_place_of_a_number(key):
    cfg = config()
    cfg.layer = L(layer)(said=1)
    assert apply_overrides(cfg, [f"layer.{key}=auto"]).layer[key] == "auto"
    assert apply_overrides(config(), ["model.padding=same"]).model.padding == "same"


def test_another_value_of_the_config_is_no_text():
    assert apply_overrides(config(), ["train.max_iter=${steps.1.size}"]).train.max_iter == 2


def test_an_object_that_is_not_there_is_told_before_its_arguments():
    with pytest.raises(UserError, match="there is no such class"):
        apply_overrides(config(), ["model.out_channels=four", "model._target_=torch.nn.Lineal"])


def test_another_object_takes_the_arguments_that_are_there():
    changed = apply_overrides(config(), ["model._target_=torch.nn.ConvTranspose2d"])
    assert changed.model._target_ == "torch.nn.ConvTranspose2d"
    # What is added in the same breath may come later.
    apply_overrides(config(), ["model._target_=torch.nn.ConvTranspose2d", "+model.output_padding=1"])
    # One that takes any arguments takes these.
    assert apply_overrides(config(), ["model._target_=detectron2.layers.Conv2d"]).model.bias


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "torch.nn.Linear",
            "model._target_=torch.nn.Linear: it takes no in_channels, out_channels, kernel_size, which model has; "
            "write a config file of your own, with model = L(torch.nn.Linear)(...).",
        ),
        ("torch.nn.Lineal", "model._target_=torch.nn.Lineal: there is no such class or function."),
    ],
)
def test_another_object_that_does_not_is_refused(target, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        apply_overrides(config(), [f"model._target_={target}"])


def test_a_place_in_a_list_is_its_number():
    cfg = apply_overrides(config(), ["steps.0.size=5", "steps.1.size=7"])
    assert OmegaConf.to_container(cfg.steps) == [{"size": 5}, {"size": 7}]


def test_an_argument_of_the_target_may_be_added():
    assert apply_overrides(config(), ["model.padding=1"]).model.padding == 1


def test_plus_adds_a_key():
    assert apply_overrides(config(), ["+train.note=hello"]).train.note == "hello"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_itr=20", "Unknown key 'train.max_itr': train has no 'max_itr'; did you mean 'max_iter'?"),
        (
            "trian.max_iter=20",
            "Unknown key 'trian.max_iter': the config has no 'trian'; did you mean 'train'?",
        ),
        ("model.chanels=3", "did you mean 'in_channels'|it has"),
        ("train.max_iter.x=1", "Unknown key 'train.max_iter.x': train.max_iter has no keys"),
        ("steps.2.size=1", "Unknown key 'steps.2.size': steps has no keys"),
        ("steps.².size=1", "Unknown key 'steps.².size': steps has no keys"),  # a digit, but no number
        ("steps.1.sise=1", "Unknown key 'steps.1.sise': steps.1 has no 'sise'; did you mean 'size'"),
        ("train.max_iter", "'train.max_iter' is not of the form key=value"),
        ("train.max_iter=[1,", r"cannot be applied"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(config(), [override])


@pytest.mark.parametrize(
    "name", ["toy/ccnet_synthetic.py", "coco/mask_rcnn_R_50_FPN_1x.py", "camvid/ccnet_R_18_D8_half.py"]
)
def test_what_is_there_may_be_said_again(name):
    """Whatever a run has as a number, a boolean or a list is of its kind."""
    cfg = get_config(name)
    same = [f"{key}={value}" for key, value in leaves(cfg, "")]
    assert len(same) > 20
    apply_overrides(cfg, same)


def leaves(node, place):
    """The keys of numbers, booleans, and lists of numbers, with what they are."""
    for key in node:
        value, path = node[key], f"{place}{key}"
        if isinstance(value, ListConfig) and all(isinstance(entry, (int, float)) for entry in value):
            yield path, list(value)
        elif isinstance(value, DictConfig):
            yield from leaves(value, f"{path}.")
        elif isinstance(value, (bool, int, float)):
            yield path, value
