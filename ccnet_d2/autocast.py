"""Half precision where a run's `train.amp` asks for it: in training, evaluation and prediction alike."""

from contextlib import AbstractContextManager

import torch
from omegaconf import DictConfig, OmegaConf

from ccnet_d2.choices import check_choice
from ccnet_d2.errors import UserError

__all__ = ["amp_dtype", "autocast", "configured_amp_dtype", "configured_autocast"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def amp_dtype(name: str, device_type: str, key: str = "train.amp.dtype") -> torch.dtype:
    """The dtype that a name means on a device.

    Args:
        name: "bfloat16", "float16", or "auto": float16 only where a GPU has no bf16 units.
        device_type: "cpu", "cuda", …
        key: where the name stands, for the errors.

    Raises:
        UserError: the name is unknown, or float16 on a CPU.
    """
    if name == "auto":
        old_gpu = device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if old_gpu else torch.bfloat16
    check_choice(key, name, ("auto", *_DTYPES))
    if name == "float16" and device_type == "cpu":
        raise UserError(f"{key}=float16 does not run on a CPU: use bfloat16.")
    return _DTYPES[name]


def configured_amp_dtype(cfg: DictConfig, device_type: str) -> torch.dtype | None:
    """What a run's `train.amp` means on a device; None for fp32, as of a run that does not say.

    Raises:
        UserError: as `amp_dtype`.
    """
    if not OmegaConf.select(cfg, "train.amp.enabled"):
        return None
    return amp_dtype(OmegaConf.select(cfg, "train.amp.dtype") or "auto", device_type)


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast to a dtype, or none."""
    context: AbstractContextManager[None] = torch.autocast(
        device_type, dtype=dtype, enabled=dtype is not None
    )
    return context


def configured_autocast(cfg: DictConfig) -> AbstractContextManager[None]:
    """Autocast as a run's `train.amp` asks for it on its `train.device`.

    Raises:
        UserError: as `amp_dtype`.
    """
    device_type = torch.device(cfg.train.device).type
    return autocast(device_type, configured_amp_dtype(cfg, device_type))
