"""One image within a model, ready to be asked where any of its pixels looks.

Shapes: h w the feature map's size, H W the image's, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccnet_d2.errors import UserError
from ccnet_d2.layers import RCCA, ClipRCCA

from .attention import AttentionMaps, attention_weights, find_rcca, record_input, rows_of

__all__ = ["AttentionView", "find_image_rcca"]


def find_image_rcca(model: nn.Module, layer: str | None = None) -> RCCA:
    """The model's RCCA layer on single images.

    Args:
        model: any module.
        layer: see `find_rcca`.

    Raises:
        ValueError: as `find_rcca`.
        UserError: its attention is over clips.
    """
    rcca = find_rcca(model, layer)
    if isinstance(rcca, ClipRCCA) or rcca.spatial_dims != 2:
        raise UserError("the model's attention is over clips, not single images: use `pixel_attention`.")
    return rcca


class AttentionView:
    """The features that go into a model's RCCA on one image, and the attention computed from them.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        logits: (K, H, W), what the model predicts for it.
        extent: see `AttentionMaps`.
    """

    def __init__(
        self, image: np.ndarray, logits: Tensor, rcca: RCCA, features: Tensor, extent: tuple[float, float]
    ) -> None:
        """
        Args:
            image, logits, extent: see above.
            rcca: the layer.
            features: (1, C, h, w), its input.
        """
        self.image = image
        self.logits = logits
        self.extent = extent
        self._rcca = rcca
        self._features = features
        self._weights: list[tuple[Tensor, ...]] = []

    @classmethod
    def of(
        cls, model: nn.Module, image: np.ndarray, inputs: dict[str, Any], layer: str | None = None
    ) -> AttentionView:
        """Run a model once.

        Args:
            model: of Detectron2's convention, in evaluation mode.
            image: (H, W, 3) uint8 RGB.
            inputs: the same image as the model takes it.
            layer: name of the RCCA layer, where the model has several.

        Raises:
            ValueError: the model has no such layer.
            UserError: its attention is over clips, or it gives no semantic segmentation.
        """
        rcca = find_image_rcca(model, layer)
        backbone = getattr(model, "backbone", rcca)
        with torch.no_grad(), record_input(rcca) as features, record_input(backbone) as padded:
            # Not through torch.compile, if the model is: a graph does not call the hooks.
            output = model.forward([inputs])[0]
        if output.get("sem_seg") is None:
            raise UserError(
                f"{type(model).__name__} gives no semantic segmentation: record the input of its RCCA with "
                "`ccnet_d2.inference.attention.record_input` and give it to `pixel_attention`."
            )
        # Models pad images at the right and below, so the image is the upper left part of the feature map.
        rows, columns = features[0].shape[-2:]
        given = inputs["image"].shape[-2:]
        full = padded[0].shape[-2:] if backbone is not rcca else given
        extent = rows * given[0] / full[0], columns * given[1] / full[1]
        return cls(image, output["sem_seg"], rcca, features[0], extent)

    @property
    def recurrence(self) -> int:
        """R of the layer."""
        return self._rcca.recurrence

    def at(self, x: int, y: int, *, recurrence: int | None = None) -> AttentionMaps:
        """Where a pixel looks after 1 … R loops.

        Args:
            x, y: the pixel, column and row in the image.
            recurrence: R; default: the layer's own.

        Raises:
            UserError: the pixel lies outside the image, or where it looks is not finite.
        """
        height, width = self.image.shape[:2]
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"pixel ({x}, {y}) lies outside the image of {width}x{height}: x,y count from 0.")
        loops = self._rcca.recurrence if recurrence is None else recurrence
        if len(self._weights) < loops or loops < 1:
            self._weights = attention_weights(self._rcca, self._features, loops)
        rows, columns = self._features.shape[-2:]
        cell = (
            min(int((y + 0.5) / height * self.extent[0]), rows - 1),
            min(int((x + 0.5) / width * self.extent[1]), columns - 1),
        )
        maps = [one[0].float().cpu().numpy() for one in rows_of(self._weights[:loops], cell)]
        if not all(np.isfinite(one).all() for one in maps):
            raise UserError(
                f"where pixel ({x}, {y}) looks is not finite (NaN or infinite): the weights may be those of a training "
                "that diverged."
            )
        return AttentionMaps(self.image, (x, y), cell, maps, self.extent)
