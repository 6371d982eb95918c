"""Training and evaluating yacs (.yaml) configs with Detectron2's `DefaultTrainer`."""

import argparse
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer

from ccnet_d2.checkpoint import SafeCheckpointer, load_checkpoint
from ccnet_d2.choices import check_choice
from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts
from ccnet_d2.data.forked_workers import fork_workers
from ccnet_d2.errors import UserError
from ccnet_d2.evaluation import CheckedSemSegEvaluator
from ccnet_d2.inference import InferenceMode, build_mode
from ccnet_d2.model_zoo import config_path
from ccnet_d2.modeling.config import refuse_without_effect

from .agreement import check_class_count, check_void, warn_of_other_names
from .distributed import (
    check_batch_size,
    check_same_start,
    copy_buffers_from_main_process,
    detectron2_shares_models,
    own_model,
)
from .evaluate_periodically import EvaluatePeriodically
from .schedule import PolynomialDecayToMinimum
from .settings import check_is_seed
from .void_labels import WatchedLoader
from .yacs_augmentations import test_augmentations, train_augmentations

POLY_LR = "PolyLR"
"""The value of SOLVER.LR_SCHEDULER_NAME for the papers' schedule; all others are Detectron2's."""


class YacsTrainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer` with this package's mapper, schedule, test modes and safe checkpoints."""

    def build_hooks(self) -> list:
        # Before a hook takes hold of Detectron2's own, which runs code from the checkpoints it reads.
        self.checkpointer = SafeCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            may_differ=self.cfg.MODEL.CCNET.WEIGHTS_MAY_DIFFER,
            trainer=weakref.proxy(self),
        )
        return [
            EvaluatePeriodically(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
            if isinstance(hook, hooks.EvalHook)
            else hook
            for hook in super().build_hooks()
        ]

    def train(self) -> Any:
        with _without_traceback_of_user_errors():
            return super().train()

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:
            raise UserError(
                f"{' '.join(str(error).split())}: lower SOLVER.BASE_LR, or set SOLVER.CLIP_GRADIENTS.ENABLED True."
            ) from error

    def _evaluate(self) -> Mapping[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = cfg.MODEL
        for key, name, registry in (
            ("META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
            ("BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
            ("SEM_SEG_HEAD.NAME", model.SEM_SEG_HEAD.NAME, SEM_SEG_HEADS_REGISTRY),
        ):
            check_choice(f"MODEL.{key}", name, [known for known, _ in registry])
        return super().build_model(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        names = list(cfg.DATASETS.TRAIN)
        mapper = SemSegMapper(
            is_train=True,
            augmentations=train_augmentations(cfg),
            dataset_names=names,
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            image_format=cfg.INPUT.FORMAT,
        )
        loader = build_detection_train_loader(cfg, mapper=mapper, dataset=get_sem_seg_dataset_dicts(names))
        return WatchedLoader(loader)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = SemSegMapper(
            is_train=False, augmentations=test_augmentations(cfg), image_format=cfg.INPUT.FORMAT
        )
        loader = build_detection_test_loader(
            dataset=get_sem_seg_dataset_dicts(dataset_name),
            mapper=mapper,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        return fork_workers(loader)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> CheckedSemSegEvaluator:
        return CheckedSemSegEvaluator(dataset_name)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer):
        solver = cfg.SOLVER
        if solver.LR_SCHEDULER_NAME != POLY_LR:
            refuse_without_effect(
                solver,
                "SOLVER",
                {"POLY_LR_POWER": None, "POLY_LR_MINIMUM": None},
                f"it belongs to SOLVER.LR_SCHEDULER_NAME {POLY_LR}, not to {solver.LR_SCHEDULER_NAME}: leave it out, "
                f"or take {POLY_LR}.",
            )
            return super().build_lr_scheduler(cfg, optimizer)
        if solver.WARMUP_ITERS:
            refuse_without_effect(
                solver,
                "SOLVER",
                {"WARMUP_ITERS": 0, "WARMUP_FACTOR": 1.0, "WARMUP_METHOD": "linear"},
                f"SOLVER.LR_SCHEDULER_NAME {POLY_LR} has no warm-up: set SOLVER.WARMUP_ITERS to 0, or train a "
                "LazyConfig with Detectron2's WarmupParamScheduler around its schedule.",
            )
        schedule = PolynomialDecayToMinimum(
            base_lr=solver.BASE_LR, min_lr=solver.POLY_LR_MINIMUM, power=solver.POLY_LR_POWER
        )
        return LRMultiplier(optimizer, schedule, solver.MAX_ITER)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> Mapping[str, Any]:
        model = own_model(model)
        copy_buffers_from_main_process(model)
        return super().test(cfg, _test_mode(cfg).bind(model, list(cfg.DATASETS.TEST)), evaluators)


@contextmanager
def _without_traceback_of_user_errors() -> Iterator[None]:
    """Detectron2's loop logs the traceback of whatever ends it; not of what will be told in a sentence."""

    def is_of_something_else(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], UserError))

    log = logging.getLogger("detectron2.engine.train_loop")
    log.addFilter(is_of_something_else)
    try:
        yield
    finally:
        log.removeFilter(is_of_something_else)


def _test_mode(cfg: CfgNode) -> InferenceMode:
    """That of TEST.CCNET, without a model yet."""
    refuse_without_effect(
        cfg.TEST.AUG,
        "TEST.AUG",
        {"ENABLED": False},
        "that is Detectron2's for instances: leave it out and set TEST.CCNET.MODE to 'ms' or 'ms-slide', which average "
        "over scales and mirrored images.",
    )
    test = cfg.TEST.CCNET
    return build_mode(test.MODE, tile=tuple(test.TILE or ()), stride=tuple(test.STRIDE or ()) or None)


def run(cfg: CfgNode, args: argparse.Namespace, *, resume: bool) -> Mapping[str, Any] | None:
    """Train, or with --eval-only evaluate, a yacs config.

    Args:
        cfg: as of `load_config`.
        args: of Detectron2's `default_argument_parser`.
        resume: go on from the last checkpoint of the output directory.

    Returns:
        The last evaluation's results; None where there is none.
    """
    check_is_seed(cfg.SEED, "SEED")
    cfg.freeze()
    args.config_file = str(config_path(args.config_file))
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ccnet_d2")
    _test_mode(cfg)  # a wrong one would be met after the training
    if args.eval_only:
        return _evaluate(cfg, resume=resume)
    _check_settings(cfg)
    check_batch_size(cfg.SOLVER.IMS_PER_BATCH, "SOLVER.IMS_PER_BATCH")
    if cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise UserError(
            f"SOLVER.AMP.ENABLED is True, which Detectron2's trainer does on CUDA, not on {cfg.MODEL.DEVICE}: set it "
            "to False, or train a LazyConfig with train.amp.enabled=True, which takes bf16 on a CPU."
        )
    with detectron2_shares_models():
        trainer = YacsTrainer(cfg)
    _try_evaluation(cfg)
    trainer.resume_or_load(resume=resume)
    check_same_start(trainer.start_iter, cfg.OUTPUT_DIR)
    if trainer.start_iter >= trainer.max_iter:
        raise UserError(
            f"Nothing to train: {cfg.OUTPUT_DIR} has a checkpoint of iteration {trainer.start_iter} and "
            f"SOLVER.MAX_ITER is {trainer.max_iter}; raise it, or use --eval-only."
        )
    trainer.train()
    return getattr(trainer, "_last_eval_results", None) or None


def _check_settings(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: a value cannot be used; Detectron2 would divide by it, or leave out a class.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN names no data set to train on.")
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD", "IMS_PER_BATCH"):
        if (cfg.SOLVER[key] or 0) < 1:  # yacs takes None for any value
            raise UserError(f"SOLVER.{key} is {cfg.SOLVER[key]}, but has to be 1 or more.")
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if processes and batch % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, but has to be a multiple of SOLVER.REFERENCE_WORLD_SIZE, {processes}."
        )
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        raise UserError(
            "DATALOADER.SAMPLER_TRAIN is 'RepeatFactorTrainingSampler', which counts the classes of instances, and "
            "label maps have none: set it to 'TrainingSampler'."
        )
    check_void(cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE")


def _try_evaluation(cfg: CfgNode) -> None:
    """Build what evaluations will build, so that a test set that cannot be used is told before the training.

    Raises:
        UserError: it cannot be used.
    """
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in cfg.DATASETS.TEST:
        try:
            YacsTrainer.build_test_loader(cfg, name)
            classes = YacsTrainer.build_evaluator(cfg, name).classes
        except UserError as error:
            advice = 'To train without an evaluation: DATASETS.TEST "()".'
            raise UserError(f"{str(error).rstrip('.')}. {advice}") from error
        check_class_count("MODEL.SEM_SEG_HEAD.NUM_CLASSES", count, "test", name, classes)
        warn_of_other_names(cfg.DATASETS.TRAIN, name, "stuff_classes")


def _evaluate(cfg: CfgNode, *, resume: bool) -> Mapping[str, Any]:
    if not cfg.DATASETS.TEST:
        raise UserError("--eval-only: DATASETS.TEST names no data set to evaluate on.")
    path = cfg.MODEL.WEIGHTS
    if resume:
        path = SafeCheckpointer(nn.Module(), cfg.OUTPUT_DIR).get_checkpoint_file()
    if not path:
        raise UserError("--eval-only needs a checkpoint: name one with MODEL.WEIGHTS PATH.")
    model = YacsTrainer.build_model(cfg)
    load_checkpoint(model, path)
    for name in cfg.DATASETS.TEST:
        warn_of_other_names(cfg.DATASETS.TRAIN, name, "stuff_classes")
    results = YacsTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)  # as the trainer does at its end
    return results
