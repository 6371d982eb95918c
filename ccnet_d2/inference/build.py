"""Test modes by name."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from ccnet_d2.instantiation import build_object

from .mode import SMALLEST_TILE, InferenceMode, WholeImage
from .multi_scale import DEFAULT_SCALES, MultiScaleFlip
from .sliding_window import SlidingWindow

__all__ = ["MODE_NAMES", "as_mode", "build_mode", "configured_mode"]

MODE_NAMES = ("whole", "slide", "ms", "ms-slide")


def build_mode(
    name: str,
    *,
    tile: int | Sequence[int] = 769,
    stride: int | Sequence[int] | None = None,
    tiles_per_batch: int = 1,
    scales: Sequence[float] = DEFAULT_SCALES,
    flip: bool = True,
    pad: str | Sequence[float] | None = None,
    accumulate_on: str | None = None,
    align_corners: bool | None = None,
    smallest_tile: int | None = SMALLEST_TILE,
) -> InferenceMode:
    """A test mode without a model yet.

    Args:
        name: "whole", "slide" (tiles), "ms" (scales and flip) or "ms-slide" (each scale in tiles).
        tile, stride, tiles_per_batch, pad: see `SlidingWindow`.
        scales, flip: see `MultiScaleFlip`.
        accumulate_on: see both.
        align_corners: see `InferenceMode`.
        smallest_tile: see `WholeImage` and `SlidingWindow`.

    Raises:
        ValueError: unknown name, or a value the mode refuses.
    """
    if name not in MODE_NAMES:
        raise ValueError(f"unknown test mode '{name}': choose one of {', '.join(MODE_NAMES)}.")
    mode: InferenceMode = WholeImage(align_corners=align_corners, smallest_tile=smallest_tile)
    if name.endswith("slide"):
        mode = SlidingWindow(
            tile=tile,
            stride=stride,
            tiles_per_batch=tiles_per_batch,
            accumulate_on=accumulate_on,
            pad=pad,
            align_corners=align_corners,
            smallest_tile=smallest_tile,
        )
    if name.startswith("ms"):
        mode = MultiScaleFlip(
            mode, scales=scales, flip=flip, accumulate_on=accumulate_on, align_corners=align_corners
        )
    return mode


def as_mode(mode: str | InferenceMode) -> InferenceMode:
    """A mode as it is, or the one of that name with its default values.

    Raises:
        ValueError: unknown name.
    """
    return build_mode(mode) if isinstance(mode, str) else mode


def configured_mode(cfg: DictConfig) -> InferenceMode | None:
    """The mode that `test.inference` of a run, a mode or its name, asks for, without a model yet; None if nothing.

    Raises:
        ValueError: unknown name, or a value the mode refuses.
    """
    configured = OmegaConf.select(cfg, "test.inference")
    if configured is None:
        return None
    return as_mode(configured if isinstance(configured, str) else build_object(cfg, "test.inference"))
