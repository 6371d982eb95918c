"""The training loader of a run, made so that it can be resumed exactly."""

import functools
import logging
from typing import Any

import torch
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig

from ccnet_d2.data.bad_samples import BadSamples
from ccnet_d2.data.train_loader import TrainLoader
from ccnet_d2.instantiation import build_object, build_value

logger = logging.getLogger(__name__)

_KEY = "dataloader.train"


def build_train_loader(cfg: DictConfig) -> Any:
    """`dataloader.train` of a run.

    Where that asks for Detectron2's `build_detection_train_loader`, it gets a `TrainLoader` with the same arguments,
    `train.on_bad_sample` and `train.seed` (a random seed, the same in all processes, where that is negative). Any
    other loader is taken as it is: its state is its own affair.
    """
    node = cfg.dataloader.train
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if isinstance(target, str):
        target = locate(target)
    if target is not build_detection_train_loader:
        loader = build_object(cfg, _KEY)
        logger.warning(
            "dataloader.train is not Detectron2's build_detection_train_loader: a resumed run will see other samples "
            "than an uninterrupted one, and what happens to bad samples is up to the loader."
        )
        return loader
    arguments = {
        key: build_value(value, f"{_KEY}.{key}")
        for key, value in node.items()
        if key not in ("_target_", "sampler")
    }
    # Batches in page-locked memory go to a GPU while it computes.
    arguments.setdefault("pin_memory", torch.device(cfg.train.device).type == "cuda")
    seed = cfg.train.seed
    return TrainLoader(
        **arguments,
        make_sampler=functools.partial(build_object, cfg, f"{_KEY}.sampler") if node.get("sampler") else None,
        seed=seed if seed >= 0 else comm.shared_random_seed(),
        bad_samples=BadSamples(cfg.train.on_bad_sample, cfg.train.bad_sample_budget),
    )
