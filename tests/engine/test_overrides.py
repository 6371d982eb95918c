"""Overrides: what is there can be changed, what nothing would read is refused by name."""

import pytest
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from torch import nn

from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError


def config():
    return OmegaConf.create(
        {
            "model": L(nn.Conv2d)(in_channels=3, out_channels=4, kernel_size=1),
            "train": {"max_iter": 10, "amp": {"enabled": False}},
            "steps": [{"size": 1}, {"size": 2}],
        },
        flags={"allow_objects": True},
    )


def test_values_change():
    cfg = apply_overrides(config(), ["train.max_iter=20", "train.amp.enabled=True", "model.out_channels=8"])
    assert cfg.train.max_iter == 20 and cfg.train.amp.enabled is True and cfg.model.out_channels == 8


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
