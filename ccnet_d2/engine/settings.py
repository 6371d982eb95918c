"""The values of `train` that no part of the loop refuses by itself, or only after hours."""

import os
import tempfile
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ccnet_d2.errors import UserError
from ccnet_d2.inference.build import configured_mode

__all__ = ["check_settings", "make_output_dir"]


def check_settings(cfg: DictConfig) -> None:
    """Look at them before anything is built.

    A limit of the gradients' norm below 0 turns them round, and one of 0 leaves nothing of them; neither fails. The
    test mode is asked for by the first evaluation only.

    Args:
        cfg: a run.

    Raises:
        UserError: a value cannot be used.
        ValueError: the test mode is unknown or cannot be made.
    """
    for key, lowest in (("max_iter", 1), ("log_period", 1), ("eval_period", 0), ("num_pictures", 0)):
        value = cfg.train[key]
        if type(value) is not int or value < lowest:  # True is an int as well
            raise UserError(f"train.{key}={value} has to be a whole number, {lowest} or more.")
    for key, lowest in (("train.total_batch_size", 1), ("train.num_workers", 0), ("test.num_workers", 0)):
        value = OmegaConf.select(cfg, f"dataloader.{key}")
        if value is not None and (type(value) is not int or value < lowest):
            raise UserError(f"dataloader.{key}={value} has to be a whole number, {lowest} or more.")
    limit = cfg.train.clip_grad_norm
    if limit is not None and not (type(limit) in (int, float) and limit > 0):
        raise UserError(
            f"train.clip_grad_norm={limit} has to be a number above 0; train.clip_grad_norm=null does not clip."
        )
    configured_mode(cfg)


def make_output_dir(folder: Any, key: str) -> None:
    """Make the output directory, and see that files can be made in it, before a log is opened there.

    Args:
        folder: the value of the config.
        key: its name there.

    Raises:
        UserError: it is no path, or files cannot be made there.
    """
    if not isinstance(folder, str) or not folder:
        raise UserError(f"{key}={folder!r} is no folder: name the one that the run writes to.")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"The run cannot write to {key}={folder}: {error.strerror or error}; name another folder."
        ) from error
