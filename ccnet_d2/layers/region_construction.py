"""RANet's region construction block: from boundary and semantic scores to regions and representative pixels.

Shapes: B batch, K classes, h w size of the map, N = h w its cells, Q regions, S representatives.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ccnet_d2.choices import check_choice

from .precision import at_least_float32, autocast_disabled
from .region_lines import line_maximum
from .region_partition import connected_regions, join_small_regions, pointer_regions, representatives
from .region_similarity import binary_jensen_shannon, jensen_shannon
from .region_smoothing import smooth_maps

VARIANTS = ("paper", "code")
KERNELS = ("mean", "free", "none")
SMALL_REGIONS = ("join", "keep")
_THRESHOLDS = {"paper": 0.5, "code": 0.8}
_OWN_WEIGHT = 0.9  # of a weighted mean W^g, for the cell itself before any training


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
    | the ends of a line (Eq. 1) | belong to it | do not |
    | E (Eq. 2) | divergence of all classes, base 2 | of the likeliest class of i, see `binary_jensen_shannon` |
    | W^g (Eq. 4) | 3x3 over the map of each cell i, a weighted mean: `kernel="mean"` | none: `"none"` |
    | threshold of sgn (Eq. 4) | 0.5; 0, as printed, would join everything, since F >= 0 | 0.8 |
    | regions | connected components of G | each cell points to the first that it belongs with |
    | regions of fewer than K cells | join others: `small_regions="join"` | stay: `"keep"` |
    | J (Eq. 5) | mean of F^g, clamped to [0, 1] | mean of F over the region's cells |
    | what J's gradient reaches | W^g: `map_gradients=False` | both maps: `True` |

    Why "paper" is as it is:

    - F_ij is the probability of i and j sharing a region, so 0.5 is where sharing becomes the likelier case. It takes
      boundary probabilities that mean it: those of "code", learned at the size of the labels, are the share of a
      cell's pixels that a thin boundary covers, for which 0.8 serves (`ccnet_d2.losses.BoundaryLoss`).
    - W^g gets its gradient from J alone, since sgn has none, and a kernel of free weights ("free": from the identity)
      shrinks or grows as suits the features that J scales, while the threshold stays where it is. Within a hundred
      iterations no F^g comes near 0.8, and each cell is a region of its own. Positive weights that sum to 1 keep F^g in
      [0, 1], where Eq. 5 has J.
    - Likewise J's gradient would turn B into whatever scale suits the features: D is a maximum, so the lines of the
      whole map push on a few cells, far harder than the boundary loss. B and C are learned from their own supervision
      (Sec. 4) instead.
    - A cell that a boundary passes through shares no region at all, as an end of its lines. The paper has K
      representatives in every region, 400 pixels in one on average and "pixels near the object boundary" among them
      (Sec. 3.2 and 5.2): so cells of smaller regions go to the region of the cell that they belong with most.

    The decisions carry no gradient; J does. A region of fewer than K cells that stays is represented by all of them.
    Maps may consist of a single region, or of one for each cell (with "join" where none has K cells); where boundaries
    are certain everywhere, "paper" gives every J = 0, and nothing is passed on.

    The tables have N^2 entries an image, so that a map should not have more than some 50 x 50 cells:
    `RegionAttention` reduces it. Computed in fp32, inside autocast too.

    :paper:`RANet: Region Attention Network for Semantic Segmentation`, Sec. 3.1 and 3.2.
    """

    def __init__(
        self,
        *,
        variant: str = "paper",
        representatives: int = 8,
        threshold: float | None = None,
        samples: int | None = None,
        use_boundary: bool = True,
        use_semantic: bool = True,
        kernel: str | None = None,
        small_regions: str | None = None,
        map_gradients: bool | None = None,
    ) -> None:
        """
        Args:
            variant: "paper" or "code", see above.
            representatives: K.
            threshold: above which two cells belong together; None for the variant's. Classes that change little by
                little are told apart by their boundary alone, of which a high threshold needs less.
            samples: points of a line that are looked at, see `line_maximum`; None for all.
            use_boundary: whether the boundary scores count (Tab. 1); without, D = 0.
            use_semantic: whether the semantic scores count (Tab. 1); without, E = 0.
            kernel: W^g, one of `KERNELS`; None for the variant's.
            small_regions: what becomes of regions of fewer than K cells, one of `SMALL_REGIONS`; None for the
                variant's.
            map_gradients: whether J's gradient reaches the two maps; None for the variant's.

        Raises:
            ValueError: an option is unknown, K is below 1, or nothing is used.
        """
        super().__init__()
        paper = variant == "paper"
        kernel = kernel or ("mean" if paper else "none")
        small_regions = small_regions or ("join" if paper else "keep")
        for name, value, known in (
            ("variant", variant, VARIANTS),
            ("kernel", kernel, KERNELS),
            ("small_regions", small_regions, SMALL_REGIONS),
        ):
            check_choice(name, value, known)
        if representatives < 1:
            raise ValueError(f"representatives must be at least 1, got {representatives}.")
        if not (use_boundary or use_semantic):
            raise ValueError("regions need boundaries or semantics: set use_boundary or use_semantic.")
        self.variant = variant
        self.representatives = representatives
        self.threshold = _THRESHOLDS[variant] if threshold is None else threshold
        self.samples = samples
        self.use_boundary = use_boundary
        self.use_semantic = use_semantic
        self.kernel_type = kernel
        self.small_regions = small_regions
        self.map_gradients = not paper if map_gradients is None else map_gradients
        # Weights of W^g ("free"), or what a softmax makes them from ("mean").
        self.kernel_weights = None
        if kernel != "none":
            weights = torch.zeros(3, 3)
            weights[1, 1] = 1 if kernel == "free" else math.log(8 * _OWN_WEIGHT / (1 - _OWN_WEIGHT))
            self.kernel_weights = nn.Parameter(weights)

    @property
    def kernel(self) -> Tensor | None:
        """W^g, (3, 3), or None."""
        if self.kernel_weights is None or self.kernel_type == "free":
            return self.kernel_weights
        return self.kernel_weights.flatten().softmax(0).reshape(3, 3)

    def forward(self, boundary: Tensor, semantic: Tensor) -> list[Regions]:
        """
        Args:
            boundary: (B, h, w) probabilities of a boundary.
            semantic: (B, K, h, w) class probabilities.

        Returns:
            One `Regions` an image.
        """
        if not self.map_gradients:
            boundary, semantic = boundary.detach(), semantic.detach()
        size = (boundary.shape[-2], boundary.shape[-1])
        with autocast_disabled(boundary.device):
            table = self.attention(at_least_float32(boundary), at_least_float32(semantic))
            with torch.no_grad():
                region = self.partition((table + table.transpose(1, 2)) / 2)
            score = representative_scores(table, region)
            if self.variant == "paper":
                score = score.clamp(0, 1)
        chosen = representatives(region, score, self.representatives)
        return [Regions(size, *parts) for parts in zip(region, score, chosen, strict=True)]

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
        kernel = self.kernel
        if kernel is None:
            return table
        maps = table.reshape(-1, *boundary.shape[-2:])
        return smooth_maps(maps, kernel.to(maps.dtype)).reshape(table.shape)

    def partition(self, attention: Tensor) -> Tensor:
        """Regions, (B, N) from 0 on, from symmetric attention scores, (B, N, N)."""
        together = attention > self.threshold
        region = connected_regions(together) if self.variant == "paper" else pointer_regions(together)
        if self.small_regions == "join":
            region = join_small_regions(region, attention, self.representatives)
        return region

    def extra_repr(self) -> str:
        return (
            f"variant={self.variant!r}, representatives={self.representatives}, threshold={self.threshold}, "
            f"samples={self.samples}, use_boundary={self.use_boundary}, use_semantic={self.use_semantic}, "
            f"kernel={self.kernel_type!r}, small_regions={self.small_regions!r}, map_gradients={self.map_gradients}"
        )


def representative_scores(table: Tensor, region: Tensor) -> Tensor:
    """J_i, the mean of F^g_ij over the pixels j of the region of i, i included (Eq. 5).

    Args:
        table: (..., N, N), F^g.
        region: (..., N) regions.

    Returns:
        (..., N).
    """
    same = region[..., :, None] == region[..., None, :]
    return (table * same).sum(-1) / same.sum(-1)
