"""Multi-scale and flip testing.

Shapes: C channels, h w image, H W answer, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccnet_d2.data.catalog import flip_pairs_of
from ccnet_d2.errors import UserError

from .mode import InferenceMode, Segmenter, WholeImage
from .out_of_memory import MEMORY_ERRORS, is_out_of_memory

__all__ = ["DEFAULT_SCALES", "MultiScaleFlip"]

DEFAULT_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

_ADDRESSABLE = 2**60
"""More elements than any memory has; sizes beyond those of its integers are errors of other kinds in torch."""


class MultiScaleFlip(InferenceMode):
    """Mean of the class probabilities over several image scales, each as it is and mirrored.

    Logits of each scale are first brought back to the answer's size, then turned into probabilities and
    averaged (CCNet, TPAMI, Sec. 4.2; mmseg). The answer is the logarithm of that mean: logits again, whose
    softmax is the mean.

    Around a `SlidingWindow` every scale is cut into tiles: `MultiScaleFlip(SlidingWindow(model))`.
    """

    def __init__(
        self,
        model: Segmenter | None = None,
        *,
        scales: Sequence[float] = DEFAULT_SCALES,
        flip: bool = True,
        flip_pairs: Sequence[Sequence[int]] | None = None,
        accumulate_on: str | torch.device | None = None,
        align_corners: bool | None = None,
    ) -> None:
        """
        Args:
            model: see `InferenceMode`.
            scales: factors on both sides of the image.
            flip: also run each scale mirrored left to right.
            flip_pairs: classes that change places when the image is mirrored (left arm and right arm); default: those
                of the data set that the mode is bound for, see `bind`.
            accumulate_on: device where probabilities are summed; default: where the model puts its logits.
            align_corners: of the resize of the image; see `InferenceMode`.

        Raises:
            ValueError: no scale, or one that is not positive and finite.
        """
        super().__init__(model, align_corners=align_corners)
        self.scales = tuple(float(scale) for scale in scales)
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be one or more positive numbers, got {list(scales)}.")
        self.flip = flip
        self.flip_pairs = None if flip_pairs is None else tuple((int(a), int(b)) for a, b in flip_pairs)
        self.accumulate_on = None if accumulate_on is None else torch.device(accumulate_on)

    def bind(self, model: Segmenter, dataset_names: str | Sequence[str] | None = None) -> InferenceMode:
        """See `InferenceMode.bind`; takes the `flip_pairs` of the data sets unless some were given.

        A mode without one nested in it runs each scale as `WholeImage`, which goes on in tiles when memory runs out.
        """
        bound = super().bind(model, dataset_names)
        assert isinstance(bound, MultiScaleFlip)
        if self.model is None:
            bound.model = WholeImage(align_corners=self.align_corners).bind(model)
        if self.flip_pairs is None and dataset_names:
            bound.flip_pairs = flip_pairs_of(dataset_names)
        return bound

    def logits(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Logarithm of the averaged probabilities (K, H, W)."""
        total: Tensor | None = None
        for scale in self.scales:
            scaled = self._scaled(image, scale)
            for mirrored in (False, True) if self.flip else (False,):
                logits = self.run([scaled.flip(-1) if mirrored else scaled], [size])[0]
                if mirrored:
                    logits = self._unflipped(logits)
                probabilities = logits.float().softmax(dim=0).to(self.accumulate_on or logits.device)
                total = probabilities if total is None else total.add_(probabilities)
        assert total is not None  # there is at least one scale
        total /= len(self.scales) * (2 if self.flip else 1)
        # A probability may underflow to 0, whose logarithm would be no number to average again.
        return total.clamp_min_(torch.finfo(total.dtype).tiny).log_()

    def _scaled(self, image: Tensor, scale: float) -> Tensor:
        height, width = image.shape[-2:]
        size = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
        if size == (height, width):
            return image
        # Images may carry leading axes (frames of a clip), which interpolate takes as one batch axis.
        frames = image.float().reshape(-1, *image.shape[-3:])
        try:
            if math.prod((*image.shape[:-2], *size)) > _ADDRESSABLE:
                raise MemoryError
            resized = F.interpolate(frames, size=size, mode="bilinear", align_corners=self.resize_aligned())
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the scale {scale:g} makes an image of {width}x{height} one of {size[1]}x{size[0]}, for which there "
                "is not enough memory: choose smaller scales."
            ) from error
        return resized.reshape(*image.shape[:-2], *size)

    def _unflipped(self, logits: Tensor) -> Tensor:
        logits = logits.flip(-1)
        if not self.flip_pairs:
            return logits
        order = list(range(logits.shape[0]))
        for a, b in self.flip_pairs:
            order[a], order[b] = order[b], order[a]
        return logits[order]

    def extra_repr(self) -> str:
        return f"scales={self.scales}, flip={self.flip}, flip_pairs={self.flip_pairs}"
