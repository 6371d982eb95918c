"""RANet's region construction block: from boundary and semantic scores to regions and representative pixels.

Shapes: B batch, K classes, h w size of the map, N = h w its cells, Q regions, S representatives.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .precision import at_least_float32, autocast_disabled
from .region_lines import line_maximum
from .region_partition import connected_regions, pointer_regions, representatives
from .region_similarity import binary_jensen_shannon, jensen_shannon
from .region_smoothing import smooth_maps

VARIANTS = ("paper", "code")
_THRESHOLD = 0.8


class Regions(NamedTuple):
    """The regions of one image.

    Attributes:
        size: (h, w) of the map that was divided.
        region: (N,) int64, 0 to Q - 1, row by row.
        score: (N,), J of Eq. 5, with a gradient.
        representatives: (S,) cells, by region and there from the highest score on.
    """

    size: tuple[int, int]
    region: Tensor
    score: Tensor
    representatives: Tensor


class RegionConstruction(nn.Module):
    """Divides a map into regions and scores how well each cell represents its own (RANet, Eq. 1 to 5).

    F_ij = (1 - D_ij)(1 - E_ij) from the highest boundary probability D between two cells and the divergence E of
    their classes; F^g = W^g * F; two cells belong together where (F^g_ij + F^g_ji) / 2 lies above a threshold; J_i
    is the mean of F^g_ij over the region of i. The K cells of the highest J represent a region.

    What the paper leaves open, and what `variant` makes of it:

    | | "paper" | "code" (as released) |
    | --- | --- | --- |
    | the ends of a line (Eq. 1) | belong to it, so a boundary cell is alone | do not |
    | E (Eq. 2) | divergence of all classes, base 2 | of the likeliest class of i, see `binary_jensen_shannon` |
    | W^g (Eq. 4) | 3x3 over the map of each cell i, from the identity, no bias | none |
    | threshold of sgn (Eq. 4) | 0.8; 0, as printed, would join everything, since F >= 0 | 0.8 |
    | regions | connected components of G | each cell points to the first that it belongs with |
    | J (Eq. 5) | mean of F^g, clamped to [0, 1] | mean of F over the region's cells |

    The decisions carry no gradient; J does, to W^g, to both maps and through them to the features. A region of fewer
    than K cells is represented by all of them. Maps may consist of a single region, or of one for each cell; where
    boundaries are certain everywhere, "paper" gives every J = 0, and nothing is passed on.

    The tables have N^2 entries an image, so that a map should not have more than some 50 x 50 cells:
    `RegionAttention` reduces it. Computed in fp32, inside autocast too.

    :paper:`RANet: Region Attention Network for Semantic Segmentation`, Sec. 3.1 and 3.2.
    """

    def __init__(
        self,
        *,
        variant: str = "paper",
        representatives: int = 8,
        threshold: float = _THRESHOLD,
        samples: int | None = None,
        use_boundary: bool = True,
        use_semantic: bool = True,
    ) -> None:
        """
        Args:
            variant: "paper" or "code", see above.
            representatives: K.
            threshold: above which two cells belong together. Classes that change little by little are told apart by
                their boundary alone, of which a high threshold needs less.
            samples: points of a line that are looked at, see `line_maximum`; None for all.
            use_boundary: whether the boundary scores count (Tab. 1); without, D = 0.
            use_semantic: whether the semantic scores count (Tab. 1); without, E = 0.

        Raises:
            ValueError: the variant is unknown, K is below 1, or nothing is used.
        """
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(map(repr, VARIANTS))}.")
        if representatives < 1:
            raise ValueError(f"representatives must be at least 1, got {representatives}.")
        if not (use_boundary or use_semantic):
            raise ValueError("regions need boundaries or semantics: set use_boundary or use_semantic.")
        self.variant = variant
        self.representatives = representatives
        self.threshold = threshold
        self.samples = samples
        self.use_boundary = use_boundary
        self.use_semantic = use_semantic
        self.kernel = None
        if variant == "paper":
            identity = torch.zeros(3, 3)
            identity[1, 1] = 1
            self.kernel = nn.Parameter(identity)

    def forward(self, boundary: Tensor, semantic: Tensor) -> list[Regions]:
        """
        Args:
            boundary: (B, h, w) probabilities of a boundary.
            semantic: (B, K, h, w) class probabilities.

        Returns:
            One `Regions` an image.
        """
        with autocast_disabled(boundary.device):
            attention = self.attention(at_least_float32(boundary), at_least_float32(semantic))
            return [self._divide(table, boundary.shape[-2:]) for table in attention]

    def attention(self, boundary: Tensor, semantic: Tensor) -> Tensor:
        """F^g, (B, N, N), of Eq. 1 to 4; arguments as for `forward`, in fp32."""
        table: Tensor | None = None
        if self.use_boundary:
            table = 1 - line_maximum(boundary, ends=self.variant == "paper", samples=self.samples)
        if self.use_semantic:
            probability = semantic.flatten(2).transpose(1, 2).contiguous()
            divergence = jensen_shannon if self.variant == "paper" else binary_jensen_shannon
            alike = 1 - divergence(probability)
            table = alike if table is None else table * alike
        assert table is not None
        if self.kernel is None:
            return table
        maps = table.reshape(-1, *boundary.shape[-2:])
        return smooth_maps(maps, self.kernel.to(maps.dtype)).reshape(table.shape)

    def _divide(self, table: Tensor, size: torch.Size) -> Regions:
        """Regions of one image from its F^g, (N, N)."""
        with torch.no_grad():
            region = self.partition((table + table.t()) / 2 > self.threshold)
        score = representative_scores(table, region)
        if self.variant == "paper":
            score = score.clamp(0, 1)
        chosen = representatives(region, score, self.representatives)
        return Regions((size[0], size[1]), region, score, chosen)

    def partition(self, together: Tensor) -> Tensor:
        """Regions of one image, (N,) from 0 on, from its decisions G, (N, N) bool."""
        return connected_regions(together) if self.variant == "paper" else pointer_regions(together)

    def extra_repr(self) -> str:
        return (
            f"variant={self.variant!r}, representatives={self.representatives}, threshold={self.threshold}, "
            f"samples={self.samples}, use_boundary={self.use_boundary}, use_semantic={self.use_semantic}"
        )


def representative_scores(table: Tensor, region: Tensor) -> Tensor:
    """J_i, the mean of F^g_ij over the pixels j of the region of i, i included (Eq. 5): (N, N), (N,) -> (N,)."""
    same = region[:, None] == region[None, :]
    return (table * same).sum(1) / same.sum(1)
