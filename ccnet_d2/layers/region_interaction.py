"""RANet's region interaction block: collection, interaction and distribution between representative pixels.

Shapes, of one image: N pixels, M channels, Q regions, S representatives in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZATIONS = ("region", "others")


class Assignment(NamedTuple):
    """Where an image's pixels belong.

    Attributes:
        region: (N,) int64, 0 to Q - 1.
        score: (N,), J of Eq. 5.
        representatives: (S,) pixels, those of a region side by side.
    """

    region: Tensor
    score: Tensor
    representatives: Tensor


def collect(features: Tensor, where: Assignment) -> Tensor:
    """Intra-region collection: A^l of Eq. 6.

    Every representative p takes J(p) A(p) and a mean of J_i A_i over the pixels of its region that are no
    representatives, weighted by the softmax of A(p) . (J_i A_i). Where the region has no others, it takes its own
    alone.

    Args:
        features: (N, M), A.
        where: regions, scores and representatives.

    Returns:
        (S, M).
    """
    weighted = where.score[:, None] * features
    chosen = where.representatives
    others = torch.ones_like(where.region, dtype=torch.bool).index_fill(0, chosen, False)
    mask = (where.region[chosen][:, None] == where.region) & others
    weights = masked_softmax(features[chosen] @ weighted.t(), mask)
    return weighted[chosen] + weights @ weighted


def interact(local: Tensor, where: Assignment, *, normalization: str = "region") -> Tensor:
    """Inter-region interaction: A^g of Eq. 7.

    Every representative p of region q takes J(p) A^l(p), and from each other region s a mean of J A^l over its
    representatives, weighted by the softmax of A^l(p) . (J A^l). As the equation is printed the softmax runs over
    each region, so that what comes in grows with the number of regions ("region"); "others" is one softmax over the
    representatives of all other regions. With a single region only the first term is left.

    Args:
        local: (S, M), A^l.
        where: regions, scores and representatives.
        normalization: one of `NORMALIZATIONS`.

    Returns:
        (S, M).
    """
    region = where.region[where.representatives]
    weighted = where.score[where.representatives][:, None] * local
    energy = local @ weighted.t()
    elsewhere = region[:, None] != region
    if normalization == "region":
        weights = softmax_by_region(energy, region) * elsewhere
    else:
        weights = masked_softmax(energy, elsewhere)
    return weighted + weights @ weighted


def distribute(features: Tensor, context: Tensor, where: Assignment) -> Tensor:
    """Intra-region distribution: O of Eq. 8.

    Every pixel i takes J_i A_i and a mean of J A^g over the representatives of its region, weighted by the softmax of
    A_i . (J A^g).

    Args:
        features: (N, M), A.
        context: (S, M), A^g.
        where: regions, scores and representatives.

    Returns:
        (N, M).
    """
    chosen = where.representatives
    weighted = where.score[chosen][:, None] * context
    mask = where.region[:, None] == where.region[chosen]
    weights = masked_softmax(features @ weighted.t(), mask)
    return where.score[:, None] * features + weights @ weighted


def region_interaction(
    features: Tensor,
    where: Assignment,
    *,
    intra: bool = True,
    inter: bool = True,
    normalization: str = "region",
) -> Tensor:
    """Eq. 6 to 8, one after the other.

    Args:
        features: (N, M), A.
        where: regions, scores and representatives.
        intra: False leaves collection and distribution out (Sec. 5.1: 79.2): representatives communicate with those of
            other regions, and are the only pixels that change.
        inter: False leaves the exchange between regions out (Sec. 5.1: 81.1).
        normalization: see `interact`.

    Returns:
        (N, M), O.
    """
    chosen = where.representatives
    local = collect(features, where) if intra else where.score[chosen][:, None] * features[chosen]
    if inter:
        context = interact(local, where, normalization=normalization)
    else:
        context = where.score[chosen][:, None] * local
    if intra:
        return distribute(features, context, where)
    own = where.score[:, None] * features
    return own.index_add(0, chosen, where.score[chosen][:, None] * context)


def masked_softmax(energy: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis of the entries that `mask` keeps, zero elsewhere, and in rows that keep none."""
    # The lowest number instead of -inf: a row without entries stays finite, and so do its gradients.
    return energy.masked_fill(~mask, torch.finfo(energy.dtype).min).softmax(-1) * mask


def softmax_by_region(energy: Tensor, region: Tensor) -> Tensor:
    """Softmax over the columns of each region by itself: (R, S), (S,) -> (R, S); each region's weights sum to 1."""
    # As many places as representatives, which are no fewer than regions: a GPU need not wait for a count.
    regions = energy.shape[1]
    columns = region.expand_as(energy)
    # Less the largest of each region, which leaves the result as it is: no exponential overflows.
    largest = energy.detach().new_full((energy.shape[0], regions), -torch.inf)
    largest = largest.scatter_reduce(1, columns, energy.detach(), "amax")
    shares = (energy - largest.gather(1, columns)).exp()
    total = shares.new_zeros(energy.shape[0], regions).scatter_add(1, columns, shares)
    return shares / total.gather(1, columns)
