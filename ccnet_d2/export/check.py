"""Comparing what a file computes with what the model computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DEFAULT_SIZES", "Difference", "compare"]

Run = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to logits (B, K, H, W)."""

DEFAULT_SIZES = ((1, 128, 160), (3, 97, 129), (2, 193, 75))
"""(batch, height, width) of the images a file is checked on: even and odd sides, upright and wide, one and several."""


@dataclass(frozen=True)
class Difference:
    """How far a file is from the model on one batch.

    Attributes:
        size: (batch, height, width).
        largest: largest absolute difference of two logits; infinite if one of them is not finite.
        reach: largest absolute logit of the model.
    """

    size: tuple[int, int, int]
    largest: float
    reach: float

    @property
    def relative(self) -> float:
        """`largest`, as a share of `reach` where that is above 1: rounding grows with the numbers rounded.

        Infinite where `largest` is.
        """
        if math.isinf(self.largest):
            return self.largest
        return self.largest / max(self.reach, 1.0)

    def __str__(self) -> str:
        batch, height, width = self.size
        return f"{batch}x3x{height}x{width}: largest difference {self.largest:.1e}, logits up to {self.reach:.1f}"


@torch.no_grad()
def compare(
    run: Run, model: nn.Module, sizes: Sequence[tuple[int, int, int]] = DEFAULT_SIZES, *, seed: int = 0
) -> list[Difference]:
    """Run both on random images of several sizes; the model is called as Detectron2 calls it, one dict an image.

    Args:
        run: the file.
        model: in evaluation mode.
        sizes: (batch, height, width) of each batch.
        seed: of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for batch, height, width in sizes:
        images = torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
        inputs = [{"image": image, "height": height, "width": width} for image in images]
        expected = torch.stack([output["sem_seg"].float().cpu() for output in model(inputs)])
        found = run(images.float())
        if found.shape != expected.shape:
            largest = math.inf
        else:
            # What is not finite on either side must not pass for a small difference.
            largest = (found - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item()
        differences.append(Difference((batch, height, width), largest, expected.abs().max().item()))
    return differences
