"""Label maps from logits without ever holding the logits of the whole answer.

Shapes: K classes, h w size of the logits, H W size of the label map.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LabelBands", "label_dtype", "labels_of", "winners"]

logger = logging.getLogger(__name__)

# Float logits resized at a time; bounds the working memory at some 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def label_dtype(num_classes: int) -> torch.dtype:
    """uint8 while class indices and the usual ignored value 255 fit, else int16."""
    return torch.uint8 if num_classes <= 255 else torch.int16


def winners(logits: Tensor) -> Tensor:
    """(K, H, W) logits -> (H, W) int64, the class of the largest; the log tells once of logits that are not finite."""
    largest, winner = logits.max(dim=0)
    if not largest.isfinite().all():  # NaN is the largest
        _tell_not_finite()
    return winner


@functools.cache
def _tell_not_finite() -> None:
    logger.warning(
        "The model's answer is not finite (NaN or infinite): such pixels get some class, which says nothing. The "
        "weights may be those of a training that diverged, or beyond the range of amp (train.amp)."
    )


def labels_of(logits: Tensor) -> Tensor:
    """(K, H, W) logits -> (H, W) labels on the CPU, a few rows at a time (`winners` makes 8-byte integers)."""
    classes, height, width = logits.shape
    labels = torch.empty((height, width), dtype=label_dtype(classes))
    rows = max(_CHUNK_ELEMENTS // max(classes * width, 1), 1)
    for top in range(0, height, rows):
        labels[top : top + rows] = winners(logits[:, top : top + rows])
    return labels


class LabelBands:
    """Takes bands of logit rows from top to bottom, resizes them bilinearly and keeps the winning class only.

    The result is that of `F.interpolate` on all rows at once; memory is one band and a bounded buffer.
    """

    def __init__(
        self, size: tuple[int, int], out_size: tuple[int, int], *, align_corners: bool = False
    ) -> None:
        """
        Args:
            size: (h, w), all the rows that will be pushed and their width.
            out_size: (H, W) of the label map.
            align_corners: as in `F.interpolate`.
        """
        self.size = size
        self.out_size = out_size
        self.align_corners = align_corners
        self._labels: Tensor | None = None
        self._upper, self._lower, self._share = _source_rows(size[0], out_size[0], align_corners)
        self._done = 0  # finished rows of the label map
        self._held: Tensor | None = None  # last input rows that later output rows still need
        self._first_held = 0
        self._received = 0

    def push(self, rows: Tensor) -> None:
        """Add the next rows: (K, n, w) float logits on any device."""
        if rows.shape[2] != self.size[1] or self._received + rows.shape[1] > self.size[0]:
            raise ValueError(f"rows {tuple(rows.shape)} after {self._received} do not fit into {self.size}.")
        if self._labels is None:
            self._labels = torch.empty(self.out_size, dtype=label_dtype(rows.shape[0]))
        self._received += rows.shape[1]
        if self.size == self.out_size:
            self._labels[self._done : self._received] = labels_of(rows)
            self._done = self._received
            return
        held = rows if self._held is None else torch.cat([self._held, rows], dim=1)
        ready = int(torch.searchsorted(self._lower, self._received))
        chunk = max(_CHUNK_ELEMENTS // (rows.shape[0] * max(self.out_size[1], self.size[1])), 1)
        for top in range(self._done, ready, chunk):
            part = slice(top, min(top + chunk, ready))
            self._labels[part] = winners(self._resized(held, part))
        self._done = ready
        if ready < self.out_size[0]:
            keep_from = min(int(self._upper[ready]), self._received)
            # A copy: a view would keep the whole band alive.
            self._held = held[:, max(keep_from - self._first_held, 0) :].clone()
            self._first_held = max(keep_from, self._first_held)

    @property
    def labels(self) -> Tensor:
        """(H, W) on the CPU, uint8 or int16; complete once all rows are in."""
        if self._labels is None or self._received != self.size[0]:
            raise RuntimeError(f"only {self._received} of {self.size[0]} rows have been pushed.")
        return self._labels

    def _resized(self, held: Tensor, part: slice) -> Tensor:
        upper = (self._upper[part] - self._first_held).to(held.device)
        lower = (self._lower[part] - self._first_held).to(held.device)
        share = self._share[part].to(held.device, held.dtype)[:, None]
        rows = torch.lerp(held[:, upper], held[:, lower], share)
        size = (rows.shape[1], self.out_size[1])
        return F.interpolate(rows[None], size=size, mode="bilinear", align_corners=self.align_corners)[0]


def _source_rows(size: int, out_size: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each output row the two input rows it lies between, and the share of the lower one."""
    out = torch.arange(out_size, dtype=torch.float64)
    if align_corners:
        source = out * ((size - 1) / (out_size - 1) if out_size > 1 else 0.0)
    else:
        source = ((out + 0.5) * (size / out_size) - 0.5).clamp_min(0)
    upper = source.floor().long().clamp_max(size - 1)
    lower = (upper + 1).clamp_max(size - 1)
    return upper, lower, (source - upper).clamp(0, 1)
