"""Exporting a run's trained model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

import ccnet_d2
from ccnet_d2.checkpoint import load_checkpoint
from ccnet_d2.errors import UserError
from ccnet_d2.inference import ClassTable
from ccnet_d2.instantiation import build_object

from .check import DEFAULT_SIZES
from .files import ExportReport, export_model
from .network import check_form

__all__ = ["export_run"]


def export_run(
    cfg: DictConfig,
    path: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    sizes: Sequence[tuple[int, int, int]] = DEFAULT_SIZES,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write the model of a run, with its class names and colours in the file's metadata.

    Args:
        cfg: the run.
        path: see `export_model`.
        checkpoint: weights; default: the run's `train.init_checkpoint`.
        sizes, tolerance: see `export_model`.

    Raises:
        UserError: no weights, or (`ExportError`) as in `export_model`.
    """
    model = build_object(cfg, "model")
    check_form(model)  # before weights are asked for that would be of no use
    checkpoint = checkpoint or OmegaConf.select(cfg, "train.init_checkpoint")
    if not checkpoint:
        raise UserError("no weights to export: give a checkpoint (train.init_checkpoint=PATH).")
    load_checkpoint(model, os.fspath(checkpoint))
    metadata = {"ccnet_d2": ccnet_d2.__version__, "input_format": model.input_format}
    classes = ClassTable.from_run(cfg)
    if classes is not None:
        metadata["classes"] = json.dumps(list(classes.names))
        metadata["colors"] = json.dumps(classes.colors.tolist())
    return export_model(model, path, metadata=metadata, sizes=sizes, tolerance=tolerance)
