"""RANet's context module: regions from boundary and semantic scores, and the exchange between their representatives.

Shapes: B batch, M channels, K classes, h w size of the features, P = h w pixels, N cells of the pair grid.
"""

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccnet_d2.choices import check_choice

from .norm_act import ActivationLike, ConvNormAct, NormLike
from .precision import at_least_float32, autocast_disabled
from .region_construction import RegionConstruction, Regions
from .region_interaction import NORMALIZATIONS, Assignment, region_interaction


class RegionAttention(nn.Module):
    """Region construction on a grid of pairs, region interaction on all pixels: A, B, C -> O, the contextual features.

    Pairs of pixels are compared on a grid of at most `pair_cells` cells in the shape of the map (49x49 for features
    of 97x97): boundary probabilities are brought there by the maximum, which keeps thin ones, class probabilities by
    the mean. A pixel has region and score of its cell, and a representative is the pixel in the middle of its cell.
    A map that is no larger is its own grid, and Eq. 1 to 8 hold as printed.

    The interaction follows Eq. 6 to 8 on the features themselves ("paper"), or the released code ("code"): 3x3
    convolutions for queries and values and after each of the three steps (those on the list of representatives as if
    it were a map of one column), softmax over all pixels or all representatives, no J on what is passed on.

    Computed in fp32, inside autocast too (the energies have no scale), but for the convolutions. At 512 channels and
    97x97, forward and backward pass take 0.6 GB an image with 25 regions, and 1 GB with one for each cell.

    :paper:`RANet: Region Attention Network for Semantic Segmentation`, Sec. 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        variant: str = "paper",
        pair_cells: int = 49 * 49,
        intra: bool = True,
        inter: bool = True,
        normalization: str = "region",
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
        **construction: Any,
    ) -> None:
        """
        Args:
            channels: M, of input and output.
            variant: "paper" or "code".
            pair_cells: cells of the grid on which pairs are compared, at most; tables have its square.
            intra, inter, normalization: see `region_interaction`; of the variant "paper".
            norm, activation: of the convolutions of the variant "code".
            construction: further arguments of `RegionConstruction`: K, the threshold, ….

        Raises:
            ValueError: a value is not among those allowed.
            TypeError: `RegionConstruction` has no such argument.
        """
        super().__init__()
        if pair_cells < 1:
            raise ValueError(f"pair_cells must be at least 1, got {pair_cells}.")
        check_choice("normalization", normalization, NORMALIZATIONS)
        if variant == "code" and not (intra and inter):
            raise ValueError("intra=False and inter=False are ablations of variant='paper'.")
        self.construction = RegionConstruction(variant=variant, **construction)
        self.pair_cells = pair_cells
        self.intra, self.inter, self.normalization = intra, inter, normalization
        self.interaction = CodeInteraction(channels, norm, activation) if variant == "code" else None

    def forward(self, features: Tensor, boundary: Tensor, semantic: Tensor) -> Tensor:
        """
        Args:
            features: (B, M, h, w), A.
            boundary: (B, h, w) probabilities of a boundary.
            semantic: (B, K, h, w) class probabilities.

        Returns:
            (B, M, h, w), O, in the dtype of `features`.
        """
        if features.shape[0] == 0:
            # No image to divide. The parameters' gradients are zeros, which distributed training waits for.
            return features + 0 * sum(parameter.sum() for parameter in self.parameters())
        size = (features.shape[-2], features.shape[-1])
        grid = pair_grid(size, self.pair_cells)
        if grid != size:
            boundary = F.adaptive_max_pool2d(boundary[:, None], grid)[:, 0]
            semantic = F.adaptive_avg_pool2d(semantic, grid)
        regions: list[Regions] = self.construction(boundary, semantic)
        assignments = [assign(of_image, size) for of_image in regions]
        if self.interaction is not None:
            context: Tensor = self.interaction(features, assignments)
            return context
        with autocast_disabled(features.device):
            pixels = at_least_float32(features).flatten(2).transpose(1, 2)
            out = torch.stack(
                [
                    region_interaction(
                        own, where, intra=self.intra, inter=self.inter, normalization=self.normalization
                    )
                    for own, where in zip(pixels, assignments, strict=True)
                ]
            )
        return out.transpose(1, 2).reshape(features.shape).to(features.dtype)

    def extra_repr(self) -> str:
        return (
            f"pair_cells={self.pair_cells}, intra={self.intra}, inter={self.inter}, "
            f"normalization={self.normalization!r}"
        )


class CodeInteraction(nn.Module):
    """The interaction of the released code, see `RegionAttention`."""

    def __init__(self, channels: int, norm: NormLike, activation: ActivationLike) -> None:
        """
        Args:
            channels: M.
            norm, activation: of the five 3x3 convolutions.
        """
        super().__init__()

        def convolution() -> ConvNormAct:
            return ConvNormAct(channels, channels, 3, norm=norm, activation=activation)

        self.query, self.value = convolution(), convolution()
        self.collect, self.interact, self.distribute = convolution(), convolution(), convolution()

    def forward(self, features: Tensor, assignments: list[Assignment]) -> Tensor:
        """(B, M, h, w) features and each image's regions -> (B, M, h, w)."""
        queries = self.query(features).flatten(2).transpose(1, 2)
        values = self.value(features).flatten(2).transpose(1, 2)
        # In the order of the map, as in the code.
        chosen = [where.representatives.sort().values for where in assignments]
        scores = [where.score[own] for where, own in zip(assignments, chosen, strict=True)]
        with autocast_disabled(features.device):
            queries, values = at_least_float32(queries), at_least_float32(values)
            local = [
                _take(value[own], value * where.score[:, None], value)
                for value, own, where in zip(values, chosen, assignments, strict=True)
            ]
        local = _on_lists(self.collect, local)
        with autocast_disabled(features.device):
            context = [_take(x, x * own[:, None], x) for x, own in zip(local, scores, strict=True)]
        context = _on_lists(self.interact, context)
        with autocast_disabled(features.device):
            out = [
                _take(query, x * own[:, None], x)
                for query, x, own in zip(queries, context, scores, strict=True)
            ]
        passed_on = torch.stack(out).transpose(1, 2).reshape(features.shape)
        distributed: Tensor = self.distribute(passed_on.to(self.distribute.conv.weight.dtype))
        return distributed


def _take(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(N, M) queries, and what each of them takes from (S, M) values by the softmax over all keys."""
    return query + (query @ key.t()).softmax(1) @ value


def _on_lists(convolution: ConvNormAct, lists: list[Tensor]) -> list[Tensor]:
    """A convolution over each image's (S, M) vectors as if they were the pixels of a column, in at least fp32.

    The norm is over the vectors of all images, as over the pixels of a batch.
    """
    dtype = convolution.conv.weight.dtype  # autocast, where it is on, chooses from there
    columns = torch.cat([convolution.conv(x.t()[None, :, :, None].to(dtype)) for x in lists], dim=2)
    # A lone vector counts twice: batch norm cannot train on a single value of each channel.
    lone = columns.shape[2] == 1
    out = convolution.normalize(torch.cat([columns, columns], dim=2) if lone else columns)
    rows = at_least_float32(out[0, :, :, 0].t())[: columns.shape[2]]
    return list(rows.split([len(x) for x in lists]))


def pair_grid(size: tuple[int, int], cells: int) -> tuple[int, int]:
    """The largest grid of at most so many cells in the shape of a map, not finer than the map itself."""
    height, width = size
    if height * width <= cells:
        return size
    rows = min(max(isqrt(cells * height // width), 1), height)
    return rows, min(max(cells // rows, 1), max(width * rows // height, 1), width)


def assign(regions: Regions, size: tuple[int, int]) -> Assignment:
    """What the cells of a grid say about the pixels of a map.

    Args:
        regions: of a grid.
        size: (h, w) of the map, P = h w pixels.

    Returns:
        Each pixel with region and score of the cell that it lies in, and the pixel in the middle of each
        representative cell.
    """
    if size == regions.size:
        return Assignment(regions.region, regions.score, regions.representatives)
    device = regions.region.device
    (row_of, middle_row), (column_of, middle_column) = (
        _along_axis(pixels, cells, device) for pixels, cells in zip(size, regions.size, strict=True)
    )
    cell = (row_of[:, None] * regions.size[1] + column_of).flatten()
    chosen = regions.representatives
    rows, columns = chosen // regions.size[1], chosen % regions.size[1]
    middle = middle_row[rows] * size[1] + middle_column[columns]
    return Assignment(regions.region[cell], regions.score[cell], middle)


def _along_axis(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cell that each pixel lies in, and the pixel in the middle of each cell."""
    cell = (2 * torch.arange(pixels, device=device) + 1) * cells // (2 * pixels)
    middle = (2 * torch.arange(cells, device=device) + 1) * pixels // (2 * cells)
    return cell, middle
