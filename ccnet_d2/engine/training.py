"""Training and evaluating a LazyConfig run."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ccnet_d2.checkpoint import SafeCheckpointer, load_checkpoint
from ccnet_d2.errors import UserError
from ccnet_d2.inference import build_mode

from .pictures import PredictionPictures
from .trainer import Trainer, auto_amp_dtype

logger = logging.getLogger(__name__)


def build_model(cfg: DictConfig) -> nn.Module:
    """The run's model on its device.

    Raises:
        UserError: the device is not there.
    """
    device = torch.device(cfg.train.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"train.device={cfg.train.device}, but torch sees no GPU: add train.device=cpu.")
    return instantiate(cfg.model).to(device)


def train(cfg: DictConfig, *, resume: bool = False) -> Mapping[str, Any] | None:
    """Train a run and evaluate it at the end (and every `train.eval_period` iterations).

    Writes to `train.output_dir`: metrics.json, TensorBoard events, model_*.pth, model_final.pth, last_checkpoint,
    evaluation.json and pictures of predictions.

    Args:
        cfg: `model`, `dataloader.{train,test,evaluator}`, `optimizer`, `lr_multiplier` and `train` as in
            configs/common/train.py.
        resume: go on from the last checkpoint in the output directory, if there is one.

    Returns:
        The last evaluation's results, on the main process.
    """
    os.makedirs(cfg.train.output_dir, exist_ok=True)
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    train_loader = instantiate(cfg.dataloader.train)
    ddp_model = create_ddp_model(model, **cfg.train.ddp)
    trainer = Trainer(
        ddp_model,
        train_loader,
        optimizer,
        amp_dtype=_amp_dtype(cfg),
        clip_grad_norm=cfg.train.clip_grad_norm,
    )
    checkpointer = SafeCheckpointer(ddp_model, cfg.train.output_dir, trainer=trainer)
    is_main = comm.is_main_process()
    pictures = PredictionPictures(cfg, model) if is_main and cfg.train.num_pictures else None
    results: dict[str, Any] = {}

    def evaluate_now():
        results.clear()
        results.update(evaluate(cfg, ddp_model) or {})
        return dict(results)

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate_now),
            pictures,
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period
            )
            if is_main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    if start_iter >= cfg.train.max_iter:
        raise UserError(
            f"Nothing to train: {cfg.train.output_dir} has a checkpoint of iteration {start_iter} and "
            f"train.max_iter is {cfg.train.max_iter}; raise it, or use --eval-only."
        )
    trainer.train(start_iter, cfg.train.max_iter)
    return results or None


def evaluate(cfg: DictConfig, model: nn.Module) -> Mapping[str, Any] | None:
    """Evaluate on `dataloader.test` with `dataloader.evaluator`, in the test mode `test.inference` and under the run's
    autocast setting.

    Results are printed and written to `train.output_dir`/evaluation.json.

    Returns:
        {task: {metric: value}}, percent; None on other processes than the main one.
    """
    if "evaluator" not in cfg.dataloader:
        return None
    dtype = _amp_dtype(cfg)
    device_type = torch.device(cfg.train.device).type
    with torch.autocast(device_type, dtype=getattr(torch, dtype) if dtype else None, enabled=bool(dtype)):
        results = inference_on_dataset(
            _in_test_mode(cfg, model),
            instantiate(cfg.dataloader.test),
            instantiate(cfg.dataloader.evaluator),
        )
    if not comm.is_main_process():
        return None
    print_csv_format(results)
    _write_json(Path(cfg.train.output_dir) / "evaluation.json", results)
    return results


def evaluate_only(cfg: DictConfig, *, resume: bool = False) -> Mapping[str, Any] | None:
    """Evaluate `train.init_checkpoint`, or with `resume` the last checkpoint of the output directory.

    Raises:
        UserError: there is no checkpoint.
    """
    path = cfg.train.init_checkpoint
    if resume:
        path = SafeCheckpointer(nn.Module(), cfg.train.output_dir).get_checkpoint_file()
    if not path:
        raise UserError("--eval-only needs a checkpoint: name one with train.init_checkpoint=PATH.")
    model = build_model(cfg)
    load_checkpoint(model, path)
    return evaluate(cfg, create_ddp_model(model))


def _in_test_mode(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """The model as `test.inference`, a mode or its name, says to run it; the model itself if the run says nothing."""
    mode = OmegaConf.select(cfg, "test.inference")
    if mode is None:
        return model
    return (build_mode(mode) if isinstance(mode, str) else instantiate(mode)).bind(model)


def _amp_dtype(cfg: DictConfig) -> str | None:
    amp = cfg.train.amp
    if not amp.enabled:
        return None
    return auto_amp_dtype(torch.device(cfg.train.device).type) if amp.dtype == "auto" else amp.dtype


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(temporary, path)
