"""Which devices there are, and what is said of those that are not."""

import pytest
import torch

from ccnet_d2 import model_zoo
from ccnet_d2.devices import available_device, parse_devices
from ccnet_d2.engine import build_model
from ccnet_d2.errors import UserError
from ccnet_d2.inference import Predictor


def test_devices_that_are_not_there(monkeypatch):
    assert parse_devices("cpu, cpu") == [torch.device("cpu")] * 2
    with pytest.raises(UserError, match="'tpu' is no device"):
        parse_devices("cpu,tpu")
    with pytest.raises(UserError, match="'None' is no device"):
        available_device(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="device 'cuda:0' was asked for, but torch sees no GPU"):
        parse_devices("cuda:0,cuda:1")
    with pytest.raises(UserError, match="'all' means every GPU, but torch sees none"):
        parse_devices("all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_devices("all") == parse_devices("cuda:0,cuda:1") == [torch.device("cuda", i) for i in (0, 1)]
    with pytest.raises(UserError, match="device 'cuda:2' was asked for, but torch sees 2 GPUs"):
        available_device("cuda:2")
    with pytest.raises(UserError, match="device 'cuda:1' is named twice"):
        parse_devices("cuda:1,cuda:0,cuda:1")
    with pytest.raises(UserError, match=r"^train.device=cuda:2, but torch sees 2 GPUs"):
        available_device("cuda:2", "train.device={}")


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu"])
def test_kinds_of_device_that_torch_was_not_built_for(kind):
    try:
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, ImportError):
        with pytest.raises(UserError, match=rf"^train.device={kind}, but torch has none here: take 'cpu'"):
            available_device(kind, "train.device={}")
    else:
        assert available_device(kind).type == kind


@pytest.mark.parametrize(
    "take",
    [
        lambda cfg: model_zoo.get("toy/ccnet_synthetic", device=cfg.train.device),
        build_model,
        lambda cfg: Predictor(cfg, "weights.pth"),
    ],
)
def test_everything_that_takes_a_device_asks_whether_it_is_there(take, monkeypatch):
    cfg = model_zoo.get_config("toy/ccnet_synthetic")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg.train.device = "cuda:7"
    with pytest.raises(UserError, match="torch sees 2 GPUs, counted from 0"):
        take(cfg)
