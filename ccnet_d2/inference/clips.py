"""Running a model of clips on whole clips.

Shapes: T frames, C channels, h w size of the network input, H W size of the answer, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccnet_d2.errors import UserError

from .mode import WholeImage
from .out_of_memory import MEMORY_ERRORS, is_out_of_memory

__all__ = ["WholeClip"]


class WholeClip(WholeImage):
    """The whole clip, all its frames at their whole size, in one pass; single images as `WholeImage` does."""

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """List of {"image": (T, C, h, w), "height": H, "width": W} -> list of {"sem_seg": (T, K, H, W)} logits.

        Raises:
            RuntimeError: the model does not answer for every frame.
            UserError: memory runs out; clips are not cut into tiles.
        """
        answers: list[dict[str, Tensor]] = []
        for item in batched_inputs:
            if item["image"].dim() == 3:
                answers += super().forward([item])
            else:
                answers.append({"sem_seg": self._clip(item)})
        return answers

    def _clip(self, item: dict[str, Any]) -> Tensor:
        if self.model is None:
            raise RuntimeError("WholeClip has no model: give WholeClip(model=...) or use .bind(model).")
        try:
            output = self.model([item])
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            height, width = item["image"].shape[-2:]
            raise UserError(
                f"a clip of {len(item['image'])} frames of {width}x{height} does not fit into memory: take shorter "
                "clips or smaller frames."
            ) from error
        logits = output[0].get("sem_seg") if isinstance(output, list) and len(output) == 1 else None
        if not isinstance(logits, Tensor) or logits.dim() != 4 or len(logits) != len(item["image"]):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise RuntimeError(
                f"{type(self.model).__name__} answered a clip of {len(item['image'])} frames with {found}, where "
                "(T, K, H, W) was due."
            )
        return logits
