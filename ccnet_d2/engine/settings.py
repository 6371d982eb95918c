"""The values of `train` that no part of the loop refuses by itself, or only after hours."""

import math
import os
import tempfile
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ccnet_d2.errors import UserError
from ccnet_d2.inference.build import configured_mode

__all__ = ["check_init_checkpoint", "check_is_seed", "check_seed", "check_settings", "make_output_dir"]

_WHOLE_NUMBERS = {
    "max_iter": 1,
    "log_period": 1,
    "eval_period": 0,
    "num_pictures": 0,
    "non_finite_retries": 0,
    "bad_sample_budget": 0,
}
"""Keys of `train`, and the least that they may be."""

_WHOLE_NUMBERS_IF_ANY = {
    "train.checkpointer.period": 1,
    "train.checkpointer.max_to_keep": 1,
    "dataloader.train.total_batch_size": 1,
    "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
    "model.sem_seg_head.num_classes": 1,
    "model.roi_heads.num_classes": 1,
    "model.num_classes": 1,
}
"""The same of keys that a run may lack, or have null for."""

_LISTS_OF_PATTERNS = ("init_may_lack", "init_may_differ")
"""Keys of `train`."""

_LARGEST_SEED = 2**31 - 1
"""Processes count on from it, and NumPy takes 32 bits."""


def check_settings(cfg: DictConfig) -> None:
    """Look at them before anything is built.

    A limit of the gradients' norm below 0 turns them round, and one of 0 leaves nothing of them; neither fails. One
    pattern that is no list counts as its characters, of which "*" is the name of everything. The test mode is asked for
    by the first evaluation only.

    Args:
        cfg: a run.

    Raises:
        UserError: a value cannot be used.
        ValueError: the test mode is unknown or cannot be made.
    """
    for key, lowest in _WHOLE_NUMBERS.items():
        value = cfg.train[key]
        if not _is_whole_number(value, lowest):
            raise UserError(f"train.{key}={value} has to be a whole number, {lowest} or more.")
    check_seed(cfg)
    for key, lowest in _WHOLE_NUMBERS_IF_ANY.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not _is_whole_number(value, lowest):
            raise UserError(f"{key}={value} has to be a whole number, {lowest} or more.")
    for key in _LISTS_OF_PATTERNS:
        patterns = cfg.train[key]
        if not isinstance(patterns, ListConfig) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(
                f"train.{key}={patterns} has to be a list of patterns of names, such as ['sem_seg_head.*'], or []."
            )
    check_init_checkpoint(cfg)
    limit = cfg.train.clip_grad_norm
    if limit is not None and not (type(limit) in (int, float) and limit > 0):
        raise UserError(
            f"train.clip_grad_norm={limit} has to be a number above 0; train.clip_grad_norm=null does not clip."
        )
    configured_mode(cfg)


def _is_whole_number(value: Any, lowest: float = -math.inf) -> bool:
    return type(value) is int and value >= lowest  # True is an int as well


def check_seed(cfg: DictConfig) -> None:
    """Look at what Detectron2 seeds the random numbers with, before it does.

    Raises:
        UserError: it is no seed.
    """
    seed = OmegaConf.select(cfg, "train.seed", default=-1)  # Detectron2's own runs need not have one
    check_is_seed(seed, "train.seed")


def check_is_seed(seed: Any, key: str) -> None:
    """
    Args:
        seed: a value of the config.
        key: its name there.

    Raises:
        UserError: it is no seed.
    """
    if not _is_whole_number(seed) or seed > _LARGEST_SEED:
        raise UserError(
            f"{key}={seed} has to be a whole number up to {_LARGEST_SEED}; one below 0 stands for another one in each "
            "run."
        )


def check_init_checkpoint(cfg: DictConfig) -> None:
    """Look at the name of the weights to start from or to evaluate.

    Raises:
        UserError: it is no text.
    """
    name = cfg.train.init_checkpoint
    if name is not None and not isinstance(name, str):
        raise UserError(
            f"train.init_checkpoint={name} has to be the name of a file, or '' for random weights."
        )


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
