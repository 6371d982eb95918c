"""Training and evaluating a LazyConfig run."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ccnet_d2.atomic_file import atomic_write_text, disk_full_reported
from ccnet_d2.autocast import configured_amp_dtype, configured_autocast
from ccnet_d2.checkpoint import SafeCheckpointer, load_checkpoint
from ccnet_d2.data.forked_workers import fork_workers
from ccnet_d2.data.train_loader import TrainLoader
from ccnet_d2.devices import available_device
from ccnet_d2.errors import UserError
from ccnet_d2.inference.build import configured_mode
from ccnet_d2.instantiation import build_object
from ccnet_d2.modeling.compilation import compile_model

from .agreement import (
    check_agreement,
    check_channel_order,
    check_data_set_names,
    check_instance_classes,
    check_test_classes,
)
from .distributed import (
    any_process,
    check_batch_size,
    check_same_start,
    copy_buffers_from_main_process,
    own_model,
    share_model,
)
from .evaluate_periodically import EvaluatePeriodically
from .frozen_norms import warn_of_idle_norms
from .metrics_file import drop_metrics_from
from .non_finite import NonFiniteGuard
from .param_groups import merge_param_groups
from .pictures import PredictionPictures
from .saving import ReportBadSamples, SaveCheckpoints
from .schedule import build_lr_multiplier
from .settings import check_init_checkpoint, check_settings
from .train_data import build_train_loader
from .trainer import Trainer
from .user_errors import USER_ERRORS, sentence_of

logger = logging.getLogger(__name__)


def build_model(cfg: DictConfig) -> nn.Module:
    """The run's model on its device.

    Raises:
        UserError: the device is not there, or the model cannot be built.
    """
    device = available_device(cfg.train.device, "train.device={}")
    model = build_object(cfg, "model").to(device)
    return compile_model(model, dynamic=None) if OmegaConf.select(cfg, "train.compile") else model


def train(cfg: DictConfig, *, resume: bool = False) -> Mapping[str, Any] | None:
    """Train a run and evaluate it at the end (and every `train.eval_period` iterations).

    Writes to `train.output_dir`: metrics.json, TensorBoard events, model_*.pth, model_final.pth, last_checkpoint,
    evaluation.json and pictures of predictions. On SIGTERM it saves at the end of the step and exits.

    Args:
        cfg: `model`, `dataloader.{train,test,evaluator}`, `optimizer`, `lr_multiplier` and `train` as in
            configs/common/train.py.
        resume: go on from the last checkpoint in the output directory, if there is one.

    Returns:
        The last evaluation's results, on the main process.
    """
    check_settings(cfg)
    os.makedirs(cfg.train.output_dir, exist_ok=True)
    if cfg.train.deterministic:
        _be_deterministic()
    check_batch_size(OmegaConf.select(cfg, "dataloader.train.total_batch_size"))
    check_data_set_names(cfg, "train")
    check_agreement(cfg)
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    trainer = _build_trainer(cfg, model)
    _try_evaluation(cfg)
    shared_model = trainer.model
    checkpointer = SafeCheckpointer(
        shared_model,
        cfg.train.output_dir,
        may_lack=cfg.train.init_may_lack,
        may_differ=cfg.train.init_may_differ,
        allow_pickle=cfg.train.allow_pickle,
        trainer=trainer,
    )
    saving = SaveCheckpoints(checkpointer, **cfg.train.checkpointer)
    results: dict[str, Any] = {}

    def evaluate_now() -> dict[str, Any]:
        results.clear()
        with saving.interruptible():
            if _is_evaluated(cfg):
                # The classes have been compared before the training; what was told of their names is told once.
                results.update(_evaluate_on(_build_test_loader(cfg), cfg, shared_model) or {})
        return dict(results)

    trainer.register_hooks(_hooks(cfg, trainer, saving, evaluate_now))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    warn_of_idle_norms(own_model(shared_model))
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    check_same_start(start_iter, cfg.train.output_dir)

    def advice() -> str:
        has_one = checkpointer.has_checkpoint()
        return "make room and go on from the last checkpoint with --resume" if has_one else ""

    if start_iter == cfg.train.max_iter and any_process(_final_evaluation_is_missing(cfg)):
        logger.info("Training is complete, but its evaluation is not.")
        with disk_full_reported(cfg.train.output_dir, advice), saving.listening():
            return evaluate_now() or None
    if start_iter >= cfg.train.max_iter:
        raise UserError(
            f"Nothing to train: {cfg.train.output_dir} has a checkpoint of iteration {start_iter} and "
            f"train.max_iter is {cfg.train.max_iter}; raise it, or use --eval-only."
        )
    with disk_full_reported(cfg.train.output_dir, advice):
        if comm.is_main_process():
            drop_metrics_from(Path(cfg.train.output_dir, "metrics.json"), start_iter)
            # Only now: the writers open metrics.json, and would go on writing to the file that was there before.
            writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
            trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])
        with saving.listening():
            trainer.train(start_iter, cfg.train.max_iter)
    return results or None


def _is_evaluated(cfg: DictConfig) -> bool:
    return OmegaConf.select(cfg, "dataloader.evaluator") is not None


def _try_evaluation(cfg: DictConfig) -> None:
    """Build what the evaluations and pictures of a run will build, so that a test set which is not there, or is of
    other classes, is told at once and not after hours of training.

    Raises:
        UserError: it cannot be used.
    """
    try:
        if _is_evaluated(cfg) or cfg.train.num_pictures:
            check_data_set_names(cfg, "test")
            build_object(cfg, "dataloader.test")
            check_test_classes(cfg)
        if _is_evaluated(cfg):
            build_object(cfg, "dataloader.evaluator")
    except USER_ERRORS as error:
        raise UserError(
            f"{sentence_of(error).rstrip('.')}. To train without an evaluation: dataloader.evaluator=null "
            "train.num_pictures=0."
        ) from error


def _build_trainer(cfg: DictConfig, model: nn.Module) -> Trainer:
    """The run's trainer, which shares the model with the other processes."""
    if OmegaConf.select(cfg, "optimizer.params") is not None:
        cfg.optimizer.params.model = model
    optimizer = build_object(cfg, "optimizer")
    merge_param_groups(optimizer)
    train_loader = build_train_loader(cfg)
    check_instance_classes(cfg)
    return Trainer(
        share_model(model, **cfg.train.ddp),
        train_loader,
        optimizer,
        amp_dtype=configured_amp_dtype(cfg, torch.device(cfg.train.device).type),
        clip_grad_norm=cfg.train.clip_grad_norm,
        guard=NonFiniteGuard(cfg.train.output_dir, cfg.train.non_finite_retries),
    )


def _hooks(
    cfg: DictConfig, trainer: Trainer, saving: SaveCheckpoints, evaluate_now: Callable[[], dict[str, Any]]
) -> list[HookBase]:
    """In the order in which they come after a step: what is learnt is saved before anything else may fail."""
    found: list[HookBase] = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=build_lr_multiplier(cfg)),
        saving,
    ]
    loader = trainer.data_loader
    if isinstance(loader, TrainLoader):
        found.append(ReportBadSamples(loader.bad_samples, cfg.train.output_dir))
    found.append(EvaluatePeriodically(cfg.train.eval_period, evaluate_now))
    if comm.is_main_process() and cfg.train.num_pictures:
        found.append(PredictionPictures(cfg, own_model(trainer.model)))
    return found


def _final_evaluation_is_missing(cfg: DictConfig) -> bool:
    """Whether a run that is at its end was stopped before or during its last evaluation."""
    if not _is_evaluated(cfg):
        return False
    results, weights = (Path(cfg.train.output_dir, name) for name in ("evaluation.json", "model_final.pth"))
    if not results.is_file():
        return True
    return weights.is_file() and results.stat().st_mtime < weights.stat().st_mtime


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def evaluate(cfg: DictConfig, model: nn.Module) -> Mapping[str, Any] | None:
    """Evaluate on `dataloader.test` with `dataloader.evaluator`, in the test mode `test.inference` and under the run's
    autocast setting.

    Results are printed and written to `train.output_dir`/evaluation.json, where NaN is null.

    Returns:
        {task: {metric: value}}, percent, NaN for a class that does not occur; None on other processes than the main
        one.
    """
    if not _is_evaluated(cfg):
        return None
    loader = _build_test_loader(cfg)
    check_test_classes(cfg)
    return _evaluate_on(loader, cfg, model)


def _build_test_loader(cfg: DictConfig) -> Any:
    return fork_workers(build_object(cfg, "dataloader.test"))


def _evaluate_on(loader: Any, cfg: DictConfig, model: nn.Module) -> Mapping[str, Any] | None:
    model = own_model(model)  # the shared one may wait for processes that have fewer images
    copy_buffers_from_main_process(model)
    with configured_autocast(cfg):
        results = inference_on_dataset(
            _in_test_mode(cfg, model), loader, build_object(cfg, "dataloader.evaluator")
        )
    if not comm.is_main_process():
        return None
    print_csv_format(results)
    write_results(Path(cfg.train.output_dir) / "evaluation.json", results)
    return results


def evaluate_only(cfg: DictConfig, *, resume: bool = False) -> Mapping[str, Any] | None:
    """Evaluate `train.init_checkpoint`, or with `resume` the last checkpoint of the output directory.

    Raises:
        UserError: there is no checkpoint or nothing to evaluate with, or the test images' channels are in another order
            than the model's.
    """
    if not _is_evaluated(cfg):
        raise UserError("--eval-only: the run has no dataloader.evaluator to evaluate with.")
    check_init_checkpoint(cfg)
    check_data_set_names(cfg, "test")
    check_channel_order(cfg, "test")
    path = cfg.train.init_checkpoint
    if resume:
        path = SafeCheckpointer(nn.Module(), cfg.train.output_dir).get_checkpoint_file()
    if not path:
        raise UserError("--eval-only needs a checkpoint: name one with train.init_checkpoint=PATH.")
    model = build_model(cfg)
    load_checkpoint(model, path, allow_pickle=cfg.train.allow_pickle and not resume)
    with disk_full_reported(cfg.train.output_dir):
        return evaluate(cfg, model)


def _in_test_mode(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """The model as `test.inference`, a mode or its name, says to run it; the model itself if the run says nothing."""
    mode = configured_mode(cfg)
    return model if mode is None else mode.bind(model, OmegaConf.select(cfg, "dataloader.test.dataset.names"))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write an evaluation's results as JSON.

    Args:
        path: the file.
        results: {task: {metric: value}}, values of NumPy and torch among them. Those that are not finite become null:
            Python would write NaN, which is no JSON and refused by what reads it strictly.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
