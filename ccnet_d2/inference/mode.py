"""What every test mode has in common, and the simplest one.

A *segmenter* is any callable with Detectron2's convention: it takes a list of dicts with `image` (C, h, w),
`height` and `width`, and returns a list of dicts with `sem_seg`, logits (K, height, width). A test mode wraps
a segmenter and is one itself, so modes nest: `MultiScaleFlip(SlidingWindow(model))`.

Shapes: C channels, h w size of the network input, H W = `height` `width`, size of the answer, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccnet_d2.errors import UserError

from .label_bands import LabelBands, labels_of
from .out_of_memory import MEMORY_ERRORS, is_out_of_memory, tell_and_free

__all__ = ["SMALLEST_TILE", "CuttingMode", "InferenceMode", "Segmenter", "WholeImage"]

SMALLEST_TILE = 128
"""Default of the smallest side, in pixels, of the tiles that memory running out leads to."""

Segmenter = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def run_segmenter(segmenter: Segmenter, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """Call a segmenter and take out the logits, one (K, height, width) for each input.

    Raises:
        RuntimeError: the answer is not one `sem_seg` of the asked size for each input.
        UserError: the model gives no semantic segmentation, or it is one of clips and answered for each frame of one.
    """
    outputs = segmenter(inputs)
    if not isinstance(outputs, Sequence) or len(outputs) != len(inputs):
        raise RuntimeError(
            f"{type(segmenter).__name__} returned {type(outputs).__name__} where {len(inputs)} dicts "
            "with 'sem_seg' were due; is it in training mode? Call .eval() first."
        )
    logits = []
    for given, output in zip(inputs, outputs, strict=True):
        sem_seg = output.get("sem_seg")
        size = (given["height"], given["width"])
        if sem_seg is None:
            gives = ", ".join(f"'{key}'" for key in output) or "nothing"
            raise UserError(
                f"{type(segmenter).__name__} gives {gives}, but no 'sem_seg': this is for semantic segmentation, so "
                "take the model's answer as it is."
            )
        if isinstance(sem_seg, Tensor) and sem_seg.dim() == given["image"].dim() == 4:
            raise UserError(
                f"a clip of {len(sem_seg)} frames cannot be tested in a mode for single images: clips are tested "
                "whole, by WholeClip, so leave test.inference as runs on clips have it."
            )
        if not isinstance(sem_seg, Tensor) or sem_seg.dim() != 3 or tuple(sem_seg.shape[1:]) != size:
            found = tuple(sem_seg.shape) if isinstance(sem_seg, Tensor) else type(sem_seg).__name__
            raise RuntimeError(
                f"{type(segmenter).__name__} returned 'sem_seg' {found} where (K, {size[0]}, {size[1]}) was "
                "due."
            )
        logits.append(sem_seg)
    return logits


def read_input(item: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """The image (C, h, w) of one Detectron2 dict and the size (H, W) its answer must have."""
    image = item["image"]
    height, width = image.shape[-2:]
    # Detectron2's own models differ on a `height` that is present but None; the image's size is meant.
    return image, (int(item.get("height") or height), int(item.get("width") or width))


def innermost(model: Segmenter | None) -> Segmenter | None:
    """The model within nested modes and data-parallel wrappers."""
    while isinstance(model, InferenceMode):
        model = model.model
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def _half_dtype(model: Segmenter | None) -> torch.dtype | None:
    """The dtype of a model's weights where that is one of 16 bits."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.dtype if first is not None and first.dtype in (torch.float16, torch.bfloat16) else None


class InferenceMode(nn.Module):
    """A way of running a segmenter on an image; itself a segmenter.

    From a LazyConfig: `test.inference = L(SlidingWindow)(tile=769)`, then
    `instantiate(cfg.test.inference).bind(model)`.
    """

    def __init__(self, model: Segmenter | None = None, *, align_corners: bool | None = None) -> None:
        """
        Args:
            model: the segmenter to run, or another mode to nest; may be given later with `bind`.
            align_corners: how this mode resizes images and logits, as in `F.interpolate`; default: as the
                model's head does (`sem_seg_head.align_corners`), False if it does not say.
        """
        super().__init__()
        self.model = model
        self.align_corners = align_corners

    def bind(self, model: Segmenter, dataset_names: str | Sequence[str] | None = None) -> InferenceMode:
        """A copy of this mode, and of the modes nested in it, around `model`.

        Args:
            model: the segmenter.
            dataset_names: what its classes mean, for the modes to which it matters (`MultiScaleFlip`).
        """
        bound = copy.copy(self)
        # copy.copy shares an nn.Module's registries: without its own the original would get the model too.
        bound._modules = dict(self._modules)
        inner = self.model.bind(model, dataset_names) if isinstance(self.model, InferenceMode) else model
        bound._modules.pop("model", None)
        bound.__dict__.pop("model", None)
        bound.model = inner
        # Detectron2's evaluation loop restores this flag to the whole tree when it is done.
        bound.training = bool(getattr(model, "training", False))
        return bound

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """List of {"image": (C, h, w), "height": H, "width": W} -> list of {"sem_seg": (K, H, W)} logits."""
        return [{"sem_seg": self.logits(*read_input(item))} for item in batched_inputs]

    @torch.no_grad()
    def predict_labels(self, batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
        """Label maps (H, W) on the CPU, uint8 up to 255 classes and int16 above; no logits are kept."""
        return [self.labels(*read_input(item)) for item in batched_inputs]

    def logits(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (K, H, W) of one image (C, h, w); `size` is (H, W)."""
        raise NotImplementedError

    def labels(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Label map (H, W) of one image (C, h, w); `size` is (H, W)."""
        return labels_of(self.logits(image, size))

    def resize_aligned(self) -> bool:
        """`align_corners` for resizing: as given, else as the model's own head resizes."""
        if self.align_corners is not None:
            return self.align_corners
        model = innermost(self.model)
        return bool(getattr(getattr(model, "sem_seg_head", model), "align_corners", False))

    def run(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Logits of several images from the wrapped segmenter, in one call."""
        if self.model is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} has no model: give {name}(model=...) or use .bind(model).")
        # Images resized or padded are float: they would raise what a model of half precision computes to fp32.
        half = _half_dtype(innermost(self.model))
        if half is not None:
            images = [image.to(half) if image.is_floating_point() else image for image in images]
        inputs = [
            {"image": image, "height": size[0], "width": size[1]}
            for image, size in zip(images, sizes, strict=True)
        ]
        return run_segmenter(self.model, inputs)


class CuttingMode(InferenceMode):
    """A mode that goes on with smaller tiles when memory runs out, which the log tells.

    It remembers what did not fit, so that later images as large are cut at once.
    """

    def __init__(
        self,
        model: Segmenter | None = None,
        *,
        align_corners: bool | None = None,
        smallest_tile: int | None = SMALLEST_TILE,
    ) -> None:
        """
        Args:
            model: see `InferenceMode`.
            align_corners: see `InferenceMode`.
            smallest_tile: when memory runs out, images are cut into halves of each side, quarters and so on, down to
                tiles of this side; None to stop with the error instead.
        """
        super().__init__(model, align_corners=align_corners)
        self.smallest_tile = smallest_tile
        self._too_large = math.inf  # pixels in one call of the model that did not fit

    def bind(self, model: Segmenter, dataset_names: str | Sequence[str] | None = None) -> InferenceMode:
        """See `InferenceMode.bind`; what did not fit another model may fit this one."""
        bound = super().bind(model, dataset_names)
        assert isinstance(bound, CuttingMode)
        bound._too_large = math.inf
        return bound

    def logits(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        return self._cut_to_fit(image, lambda mode: mode.logits_at_once(image, size))

    def labels(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        return self._cut_to_fit(image, lambda mode: mode.labels_at_once(image, size))

    def logits_at_once(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """`logits` by this very mode, or the error that memory ran out."""
        raise NotImplementedError

    def labels_at_once(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """`labels` by this very mode, or the error that memory ran out."""
        raise NotImplementedError

    def pixels(self, image: Tensor) -> int:
        """Pixels of an image (C, h, w) in one call of the model."""
        raise NotImplementedError

    def description(self) -> str:
        """One line, without the model."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def spare_memory(self) -> bool:
        """Take less memory from now on, with the same answers; whether that was possible."""
        return False

    def smaller(self, image: Tensor) -> CuttingMode | None:
        """A mode for the image that calls the model with fewer pixels; None where the tiles would be too small."""
        raise NotImplementedError

    def _cut_to_fit(self, image: Tensor, answer: Callable[[CuttingMode], Tensor]) -> Tensor:
        mode: CuttingMode = self
        while mode.pixels(image) >= self._too_large:
            smaller = mode.smaller(image)
            if smaller is None:
                break
            mode = smaller
        while True:
            try:
                return answer(mode)
            except MEMORY_ERRORS as error:
                if self.smallest_tile is None or not is_out_of_memory(error):
                    raise
                before = mode.description()
                smaller = mode if mode.spare_memory() else mode.smaller(image)
                if smaller is None:
                    raise
            # Out of the except block, where the error holds on to the tensors of the failed attempt.
            if smaller is not mode:
                self._too_large = min(self._too_large, mode.pixels(image))
                mode = smaller
            height, width = image.shape[-2:]
            tell_and_free(f"an image of {width}x{height} in {before}", mode.description())


class WholeImage(CuttingMode):
    """The whole image in one pass; in tiles where memory does not suffice for that."""

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """See `InferenceMode.forward`; images of one size go through the model as one batch.

        Those of different sizes do not: a model pads them to the largest, and attention sees the padding, so that what
        becomes of an image would depend on those beside it.
        """
        items = [read_input(item) for item in batched_inputs]
        alike = len({image.shape for image, _ in items}) == 1
        if len(items) > 1 and alike and sum(self.pixels(image) for image, _ in items) < self._too_large:
            try:
                return [{"sem_seg": one} for one in self.run(*zip(*items, strict=True))]
            except MEMORY_ERRORS as error:
                if self.smallest_tile is None or not is_out_of_memory(error):
                    raise
            tell_and_free(f"{len(items)} images at once", "one at a time")
        return [{"sem_seg": self.logits(*item)} for item in items]

    def logits_at_once(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        return self.run([image], [size])[0]

    def labels_at_once(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        # At the input's size: K float maps in the size of a large photograph may not fit.
        own = (image.shape[-2], image.shape[-1])
        logits = self.run([image], [own])[0]
        bands = LabelBands(own, size, align_corners=self.resize_aligned())
        bands.push(logits)
        return bands.labels

    def pixels(self, image: Tensor) -> int:
        return image.shape[-2] * image.shape[-1]

    def smaller(self, image: Tensor) -> CuttingMode | None:
        from .sliding_window import SlidingWindow  # which is a mode, and so imports this module

        whole = SlidingWindow(
            self.model,
            tile=image.shape[-2:],
            accumulate_on="cpu",
            align_corners=self.align_corners,
            smallest_tile=self.smallest_tile,
        )
        return whole.smaller(image)
