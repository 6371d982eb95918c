"""Sliding-window inference.

Shapes: C channels, h w image, H W answer, K classes, all sizes in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccnet_d2.data.transforms.resize import height_and_width
from ccnet_d2.windows import window_starts

from .label_bands import LabelBands, label_dtype, winners
from .mode import SMALLEST_TILE, CuttingMode, Segmenter, innermost

__all__ = ["SlidingWindow"]


class SlidingWindow(CuttingMode):
    """Overlapping tiles, their logits averaged where they overlap.

    Tiles and averaging are those of the official CCNet evaluation and of mmseg's `slide_inference`. Tiles at
    the right and lower border are moved inside. Logits are averaged at the image's own size, and resized
    afterwards when another size is asked for.

    An image smaller than the tile: by default the tile shrinks to the image (mmseg); with `pad="mean"` the
    image is padded at the right and below with the model's pixel mean, which is zero after normalisation
    (official code).

    Where memory does not suffice, tiles go through the model one at a time and logits are summed on the CPU, which
    changes nothing else; if that is not enough, tiles and stride are halved, which the log tells.
    """

    def __init__(
        self,
        model: Segmenter | None = None,
        *,
        tile: int | Sequence[int] = 769,
        stride: int | Sequence[int] | None = None,
        tiles_per_batch: int = 1,
        accumulate_on: str | torch.device | None = None,
        pad: str | Sequence[float] | None = None,
        align_corners: bool | None = None,
        smallest_tile: int | None = SMALLEST_TILE,
    ) -> None:
        """
        Args:
            model: see `InferenceMode`.
            tile: tile size, one number or (height, width).
            stride: step between tiles, one number or (vertical, horizontal); default: two thirds of the tile,
                rounded up (overlap 1/3).
            tiles_per_batch: tiles in one call of the model; more is faster on a GPU and takes more memory.
            accumulate_on: device where logits are summed, for instance "cpu" when those of the whole image do
                not fit on the GPU; default: where the model puts them.
            pad: for images smaller than the tile: None, "mean" (the model's `pixel_mean`) or one value per
                channel.
            align_corners: of the final resize to (H, W); see `InferenceMode`.
            smallest_tile: side down to which tiles are halved when memory runs out; None to stop with the error.

        Raises:
            ValueError: sizes that are not whole pixels above 0, a stride larger than the tile, or an unknown `pad`.
        """
        super().__init__(model, align_corners=align_corners, smallest_tile=smallest_tile)
        self.tile = height_and_width(tile, "SlidingWindow: tile")
        default = (-(-2 * self.tile[0] // 3), -(-2 * self.tile[1] // 3))
        self.stride = default if stride is None else height_and_width(stride, "SlidingWindow: stride")
        if self.stride[0] > self.tile[0] or self.stride[1] > self.tile[1]:
            raise ValueError(
                f"stride {self.stride} is larger than tile {self.tile}: pixels would be left out."
            )
        if tiles_per_batch < 1:
            raise ValueError(f"tiles_per_batch must be at least 1, got {tiles_per_batch}.")
        if isinstance(pad, str) and pad != "mean":
            raise ValueError(f"pad must be None, 'mean' or one value per channel, got '{pad}'.")
        self.tiles_per_batch = tiles_per_batch
        self.accumulate_on = None if accumulate_on is None else torch.device(accumulate_on)
        self.pad = pad if pad is None or isinstance(pad, str) else tuple(float(value) for value in pad)

    def logits_at_once(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Averaged logits (K, H, W)."""
        out: Tensor | None = None
        for rows, columns, block in self._finished_blocks(image):
            if out is None:
                out = block.new_empty((block.shape[0], *image.shape[-2:]))
            out[:, rows, columns] = block
        assert out is not None  # an image has at least one tile
        if tuple(out.shape[-2:]) == size:
            return out
        return F.interpolate(out[None], size=size, mode="bilinear", align_corners=self.resize_aligned())[0]

    def labels_at_once(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Label map (H, W).

        Memory besides the image and the map is that of a few tiles plus the overlap of two rows of tiles,
        whatever the image's height: K x overlap x w floats on the accumulation device, and K x stride x w
        more when H, W is not the image's own size.
        """
        if tuple(image.shape[-2:]) != size:
            return self._resized_labels(image, size)
        labels: Tensor | None = None
        for rows, columns, block in self._finished_blocks(image):
            if labels is None:
                labels = torch.empty(size, dtype=label_dtype(block.shape[0]))
            labels[rows, columns] = winners(block)
        assert labels is not None
        return labels

    def pixels(self, image: Tensor) -> int:
        return self.tiles_per_batch * self._tile_in(image)[0] * self._tile_in(image)[1]

    def spare_memory(self) -> bool:
        on_cpu = self.accumulate_on == torch.device("cpu") or not torch.cuda.is_available()
        if self.tiles_per_batch == 1 and on_cpu:
            return False
        self.tiles_per_batch = 1
        self.accumulate_on = torch.device("cpu")
        return True

    def smaller(self, image: Tensor) -> CuttingMode | None:
        if self.smallest_tile is None:
            return None
        sides, steps = [], []
        for side, step in zip(self._tile_in(image), self.stride, strict=True):
            half = (side + 1) // 2
            if half < self.smallest_tile:
                half = side
            sides.append(half)
            steps.append(max(min(step, side) * half // side, 1))
        if tuple(sides) == self._tile_in(image):
            return None
        return SlidingWindow(
            self.model,
            tile=sides,
            stride=steps,
            accumulate_on="cpu",
            pad=self.pad,
            align_corners=self.align_corners,
            smallest_tile=self.smallest_tile,
        )

    def _tile_in(self, image: Tensor) -> tuple[int, int]:
        """The tile's size, which is the image's where that is smaller and not padded."""
        if self.pad is not None:
            return self.tile
        return min(self.tile[0], image.shape[-2]), min(self.tile[1], image.shape[-1])

    def _resized_labels(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = image.shape[-2:]
        bands = LabelBands((height, width), size, align_corners=self.resize_aligned())
        band: Tensor | None = None
        for _, columns, block in self._finished_blocks(image):
            if columns.start == 0:
                band = block.new_empty((*block.shape[:2], width))
            assert band is not None
            band[:, :, columns] = block
            if columns.stop == width:
                bands.push(band)
        return bands.labels

    def _finished_blocks(self, image: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and averaged logits (K, rows, columns) of parts no later tile touches, in order.

        Only sums that later tiles add to are kept: `beside`, columns shared with the next tile, and `below`,
        rows shared with the next row of tiles.
        """
        height, width = image.shape[-2:]
        image = self._padded(image)
        tops = window_starts(image.shape[-2], self.tile[0], self.stride[0])
        lefts = window_starts(image.shape[-1], self.tile[1], self.stride[1])
        tile_height = min(self.tile[0], image.shape[-2])
        tile_width = min(self.tile[1], image.shape[-1])
        row_counts = _coverage(image.shape[-2], tile_height, tops)
        column_counts = _coverage(image.shape[-1], tile_width, lefts)
        tiles = self._tile_logits(image, tops, lefts, tile_height, tile_width)

        below: Tensor | None = None  # (K, shared rows, w), written and read column block by column block
        for row, top in enumerate(tops):
            bottom = tops[row + 1] if row + 1 < len(tops) else image.shape[-2]
            shared_above = tops[row - 1] + tile_height - top if row else 0
            beside: Tensor | None = None
            next_below: Tensor | None = None
            for column, left in enumerate(lefts):
                right = lefts[column + 1] if column + 1 < len(lefts) else image.shape[-1]
                sums = next(tiles)
                if beside is not None:
                    sums[:, :, : beside.shape[2]] += beside
                done, beside = sums[:, :, : right - left], sums[:, :, right - left :]
                if below is not None:
                    done[:, :shared_above] += below[:, :, left:right]
                if top + tile_height > bottom:
                    if next_below is None:
                        shape = (sums.shape[0], top + tile_height - bottom, image.shape[-1])
                        next_below = sums.new_empty(shape)
                    next_below[:, :, left:right] = done[:, bottom - top :]
                block = done[:, : bottom - top]
                counts = row_counts[top:bottom, None] * column_counts[left:right]
                block /= counts.to(block.device)
                # Padding only ever lies in the last row or column of tiles.
                rows, columns = slice(top, min(bottom, height)), slice(left, min(right, width))
                yield rows, columns, block[:, : rows.stop - top, : columns.stop - left]
            below = next_below

    def _tile_logits(
        self, image: Tensor, tops: list[int], lefts: list[int], height: int, width: int
    ) -> Iterator[Tensor]:
        """Logits (K, height, width) of the tiles in reading order, free to be written to."""
        corners = [(top, left) for top in tops for left in lefts]
        for first in range(0, len(corners), self.tiles_per_batch):
            batch = corners[first : first + self.tiles_per_batch]
            tiles = [image[..., top : top + height, left : left + width] for top, left in batch]
            for logits in self.run(tiles, [(height, width)] * len(tiles)):
                moved = logits.to(self.accumulate_on or logits.device, torch.float32)
                # Never write into what the model returned: it may hold on to it.
                yield moved.clone() if moved is logits else moved

    def _padded(self, image: Tensor) -> Tensor:
        missing = max(self.tile[0] - image.shape[-2], 0), max(self.tile[1] - image.shape[-1], 0)
        if self.pad is None or missing == (0, 0):
            return image
        values = torch.as_tensor(_pixel_mean(self.model) if self.pad == "mean" else self.pad).flatten()
        channels, height, width = image.shape[-3:]
        if values.numel() != channels:
            raise ValueError(f"pad has {values.numel()} values for an image of {channels} channels.")
        size = (*image.shape[:-2], height + missing[0], width + missing[1])
        padded = values.to(image.device, torch.float32)[:, None, None].expand(size).clone()
        padded[..., :height, :width] = image
        return padded

    def extra_repr(self) -> str:
        return (
            f"tile={self.tile}, stride={self.stride}, tiles_per_batch={self.tiles_per_batch}, pad={self.pad}"
        )


def _coverage(size: int, tile: int, starts: list[int]) -> Tensor:
    """How many tiles cover each pixel along one axis."""
    counts = torch.zeros(size)
    for start in starts:
        counts[start : start + tile] += 1
    return counts


def _pixel_mean(model: Segmenter | None) -> Tensor:
    model = innermost(model)
    mean = getattr(model, "pixel_mean", None)
    if mean is None:
        raise ValueError(
            f"pad='mean' needs a model with 'pixel_mean', which {type(model).__name__} has not; "
            "give the values."
        )
    return torch.as_tensor(mean).detach().cpu()
