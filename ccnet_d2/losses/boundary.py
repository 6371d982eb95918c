"""Where the class changes: boundary masks from labels, and the loss of a boundary score map.

Shapes: B batch, h w the logits' size, H W the labels' size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.layers.precision import at_least_float32, autocast_disabled

from .reduction import balanced_mean_over_processes, mean_over_processes
from .resize import upsample
from .segmentation_loss import check_map_and_labels


def label_boundaries(target: Tensor, radius: float = 2.0, ignore_index: int = 255) -> Tensor:
    """Which pixels lie near another class: at a Euclidean distance of at most `radius` from a pixel of it.

    The same as, class by class, a distance transform of the pixels of all other classes, which is how the released
    code makes its masks. Differently from there, neither unlabelled pixels nor the image's edge make a boundary:
    both say nothing about where an object ends. It is made from the labels that the network is trained on, after
    scaling and cropping, so boundaries are equally wide at all scales.

    :paper:`RANet`, Sec. 4 (after CASENet and SEAL).

    Args:
        target: (B, H, W) integer labels.
        radius: in pixels; neighbours are at a distance of 1.
        ignore_index: label of unlabelled pixels.

    Returns:
        (B, H, W) bool, False where there is no label.
    """
    height, width = target.shape[-2:]
    labelled = target != ignore_index
    boundary = torch.zeros_like(labelled)
    reach = int(radius)
    for down in range(0, min(reach, height - 1) + 1):
        for right in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            # Half of the offsets are enough: a pair of pixels marks both.
            if down * down + right * right > radius * radius or (down == 0 and right <= 0):
                continue
            here = (..., slice(0, height - down), slice(max(0, -right), width - max(0, right)))
            there = (..., slice(down, height), slice(max(0, right), width - max(0, -right)))
            differ = (target[here] != target[there]) & labelled[here] & labelled[there]
            boundary[here] |= differ
            boundary[there] |= differ
    return boundary


RESOLUTIONS = ("labels", "map")


class BoundaryLoss(nn.Module):
    """Binary cross entropy of a boundary score map.

    Either the map is enlarged bilinearly to the labels' size, or the mask is brought to the size of the map, where a
    cell is a boundary if one passes through it. A map of stride 8 cannot tell which of a cell's pixels a thin boundary
    lies on, and enlarged it learns the share of them: a fifth or so, where the boundary is certain. With
    `align_corners` the pixels of a cell are those around where the enlargement puts it: the first and the last cell
    stand at the corners, and have half as many.

    Takes the labels of the segmentation and makes the mask itself. Pixels without a label take no part; a batch
    without any gives zero with a graph. Computed in fp32, inside autocast too. In distributed training the mean is over
    the pixels of all processes, see `mean_over_processes`.

    :paper:`RANet`, Sec. 4: "We use the cross-entropy loss to penalize all of the training error."
    """

    def __init__(
        self,
        *,
        radius: float = 2.0,
        balanced: bool = False,
        resolution: str = "labels",
        ignore_index: int = 255,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            radius: see `label_boundaries`.
            balanced: weigh boundary pixels by the share of the others in the batch, that of all processes, and the
                other way round, so that both count the same; RANet does not.
            resolution: "labels" or "map": the size that map and mask are compared at.
            ignore_index: label of the pixels left out.
            align_corners: of the enlargement, and of where the cells of the map lie.

        Raises:
            ValueError: the radius is below 1, so no pixel would be near another; the resolution is unknown.
        """
        super().__init__()
        if radius < 1:
            raise ValueError(f"radius must be at least 1 pixel, got {radius}.")
        check_choice("resolution", resolution, RESOLUTIONS)
        self.radius = radius
        self.balanced = balanced
        self.resolution = resolution
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            logits: (B, 1, h, w), of being a boundary.
            target: (B, H, W) integer labels of the segmentation.

        Returns:
            Scalar, fp32 (fp64 for fp64 logits).

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        check_map_and_labels(logits, target, "boundary logits")
        if logits.shape[1] != 1:
            raise ValueError(f"boundary logits have one channel, got {logits.shape[1]}.")
        boundary = label_boundaries(target, self.radius, self.ignore_index)
        labelled = target != self.ignore_index
        with autocast_disabled(logits.device):
            scores = at_least_float32(logits)
            if self.resolution == "map":
                boundary, labelled = (
                    _pooled(mask, scores.shape[-2:], self.align_corners) for mask in (boundary, labelled)
                )
            else:
                scores = upsample(scores, (target.shape[-2], target.shape[-1]), self.align_corners)
            # A weight of 0 would not be enough where the score is not finite.
            scores = scores[:, 0].masked_fill(~labelled, 0)
            per_pixel = F.binary_cross_entropy_with_logits(
                scores, boundary.to(scores.dtype), reduction="none"
            )
            if self.balanced:
                return balanced_mean_over_processes(per_pixel, boundary, labelled & ~boundary)
            return mean_over_processes((per_pixel * labelled).sum(), labelled.sum())

    def extra_repr(self) -> str:
        return (
            f"radius={self.radius}, balanced={self.balanced}, resolution={self.resolution!r}, "
            f"ignore_index={self.ignore_index}, align_corners={self.align_corners}"
        )


def _pooled(mask: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """(B, H, W) bool -> (B, h, w) bool: whether any of a cell's pixels is set."""
    pixels = mask.float()
    if align_corners:
        (top, bottom), (left, right) = map(_half_cells, mask.shape[-2:], size)
        pixels = F.pad(pixels, (left, right, top, bottom))
    return F.adaptive_max_pool2d(pixels, (size[0], size[1])) > 0


def _half_cells(pixels: int, cells: int) -> tuple[int, int]:
    """How far the first and the last of some cells reach beyond the pixels, where both stand at the corners."""
    if cells == 1:
        return 0, 0
    step = (pixels - 1) / (cells - 1)
    before = round(step / 2)
    return before, max(round(step * cells) - pixels - before, 0)
