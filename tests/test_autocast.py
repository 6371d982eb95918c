import pytest
import torch
from omegaconf import OmegaConf

from ccnet_d2.autocast import amp_dtype, autocast, configured_amp_dtype
from ccnet_d2.errors import UserError


def test_what_a_run_asks_for():
    def configured(**amp):
        return configured_amp_dtype(OmegaConf.create({"train": {"amp": amp}}), "cpu")

    assert configured(enabled=True, dtype="auto") is torch.bfloat16
    assert configured(enabled=True) is torch.bfloat16
    assert configured(enabled=False, dtype="bfloat16") is None
    assert configured_amp_dtype(OmegaConf.create({"model": {}}), "cpu") is None
    with pytest.raises(UserError, match=r"train\.amp\.dtype='bf16' is not"):
        configured(enabled=True, dtype="bf16")


def test_old_gpus_have_float16_alone(monkeypatch):
    for has_bf16, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert amp_dtype("auto", "cuda") is wanted
    assert amp_dtype("auto", "cpu") is torch.bfloat16
    assert amp_dtype("float16", "cuda") is torch.float16


def test_products_inside():
    x = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast("cpu", dtype):
            assert (x @ x).dtype == dtype
    with autocast("cpu", None):
        assert (x @ x).dtype == torch.float32
