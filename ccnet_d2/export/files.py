"""Writing a model to a file that is checked before it appears."""

from __future__ import annotations

import inspect
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from ccnet_d2.atomic_file import atomic_write

from .check import DEFAULT_SIZES, Difference, Run, compare
from .network import ExportError, check_form
from .program import LEAST_SIDE, MOST_SIDE, trace

__all__ = ["FORMATS", "ExportReport", "export_model", "load_program"]

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
"""Formats by the file's suffix."""

_Maker = Callable[[ExportedProgram, Mapping[str, str]], tuple[bytes, Run]]
"""Program and metadata to the file's content, and a function that runs it."""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        size: in bytes.
        differences: of the file from the model, one for each size checked.
    """

    path: Path
    size: int
    differences: list[Difference]


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    sizes: Sequence[tuple[int, int, int]] = DEFAULT_SIZES,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write a segmentation model as one file that takes images of any batch, height and width.

    The input is `images`, (B, 3, H, W) float32 in 0-255 with channels in the model's `input_format`; the output is
    `logits`, (B, K, H, W) float32. Normalisation is in the file. What will be in the file is first run, by ONNX
    Runtime or by torch, against the model itself; only then the file appears.

    Args:
        model: a segmentation network (see `ExportedNetwork`); it is put in evaluation mode.
        path: where to write; the suffix says what: .onnx, or .pt2 for `torch.export`.
        metadata: what else the file should say about itself (ONNX metadata; a dict beside the .pt2 program).
        sizes: (batch, height, width) of the batches to compare on.
        tolerance: largest difference allowed between logits, where logits are above 1 as a share of the largest.

    Raises:
        ExportError: the suffix is another, a size or the tolerance is out of range, the model cannot be exported, or a
            difference is above the tolerance; nothing is written then.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix not in FORMATS:
        raise ExportError(f"'{path}' must end in .onnx or .pt2 (torch.export), which says what to write.")
    if os.path.isdir(path):
        raise ExportError(f"'{path}' is a folder: name a file.")
    if not sizes or any(
        batch < 1 or not LEAST_SIDE <= min(sides) <= max(sides) <= MOST_SIDE for batch, *sides in sizes
    ):
        raise ExportError(
            f"sizes to check on must be (batch, height, width) with sides of at least {LEAST_SIDE} and at most "
            f"{MOST_SIDE}."
        )
    if not tolerance >= 0:
        raise ExportError(f"the tolerance must be 0 or above, got {tolerance:g}.")
    check_form(model)  # before packages are asked for that would be of no use
    make = _onnx_maker() if path.suffix == ".onnx" else _pt2
    model.eval()
    content, run = make(trace(model), metadata or {})
    differences = compare(run, model, sizes)
    worst = max(differences, key=lambda difference: difference.relative)
    if not worst.relative <= tolerance:
        raise ExportError(
            f"nothing was written: the file would not compute what the model computes ({worst})."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise ExportError(f"cannot write '{path}': {error.strerror or error}.") from error
    return ExportReport(path, len(content), differences)


def load_program(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, str]]:
    """The network in a .pt2 file, as a module from images to logits, and what the file says about itself."""
    about = {"metadata": ""}
    program = torch.export.load(os.fspath(path), extra_files=about)
    return program.module(), json.loads(about["metadata"] or "{}")


def _onnx_maker() -> _Maker:
    try:
        from .onnx_format import onnx_bytes, onnx_runner  # optional packages
    except ImportError as error:
        raise ExportError(
            f"ONNX files need the packages onnx, onnxruntime and onnxscript, and {error.name} is missing: "
            "pip install 'ccnet_d2[export]', or write a .pt2 file, which needs none of them."
        ) from error
    if "optimize" not in inspect.signature(torch.onnx.export).parameters:  # up to 2.5
        raise ExportError(
            f"ONNX files need a newer torch than {torch.__version__}: take 2.10 or later, or write a .pt2 file."
        )

    def make(program: ExportedProgram, metadata: Mapping[str, str]) -> tuple[bytes, Run]:
        content = onnx_bytes(program, metadata)
        return content, onnx_runner(content)

    return make


def _pt2(program: ExportedProgram, metadata: Mapping[str, str]) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata": json.dumps(dict(metadata))})
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()
