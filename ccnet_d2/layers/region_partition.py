"""From "these two pixels belong together" to regions (RANet, Sec. 3.1), and each region's representatives (Sec. 3.2).

Shapes: N pixels of one image, Q regions, S representatives.
"""

import torch
from torch import Tensor

_JUMPS = 10  # of the released code


def connected_regions(together: Tensor) -> Tensor:
    """Regions as connected components: two pixels share one if a chain of pairs leads from one to the other.

    Args:
        together: (N, N) bool, symmetric; the diagonal does not matter.

    Returns:
        (N,) int64, regions 0 to Q - 1, numbered in the order of their first pixels.
    """
    pixels = together.shape[0]
    parent = torch.arange(pixels, device=together.device)
    beyond = torch.tensor(pixels, dtype=torch.int32, device=together.device)
    while True:
        # Every pixel looks for the smallest root next to it, roots are hung under what their pixels found, and paths
        # are shortened. Roots only get smaller, so this ends, after some log N rounds.
        nearest = torch.where(together, parent.int()[None, :], beyond).amin(dim=1)
        found = torch.minimum(parent, nearest.long())
        hung = parent.scatter_reduce(0, parent, found, "amin")
        hung = torch.minimum(hung, found)
        while True:
            shorter = hung[hung]
            if torch.equal(shorter, hung):
                break
            hung = shorter
        if torch.equal(hung, parent):
            return _numbered(parent)
        parent = hung


def pointer_regions(together: Tensor) -> Tensor:
    """Regions as in the released code: each pixel points to the first one it belongs with; then ten jumps.

    A pixel i points to the smallest j <= i with `together[i, j]`, itself if there is none.

    Args:
        together: (N, N) bool.

    Returns:
        (N,) int64, regions 0 to Q - 1, numbered in the order of the pixels pointed to.
    """
    own = torch.eye(together.shape[0], dtype=torch.bool, device=together.device)
    pointer = (together | own).int().argmax(dim=1)  # the first of the largest; never behind i itself
    for _ in range(_JUMPS):
        pointer = pointer[pointer]
    return _numbered(pointer)


def representatives(region: Tensor, score: Tensor, count: int) -> Tensor:
    """The pixels of the highest scores in each region.

    A region of fewer than `count` pixels is represented by all of them; of equal scores the first pixel counts more.

    Args:
        region: (N,) regions, 0 to Q - 1.
        score: (N,), J of Eq. 5.
        count: K.

    Returns:
        (S,) pixels, by region and there from the highest score on.
    """
    order = score.detach().argsort(descending=True, stable=True)
    order = order[region[order].argsort(stable=True)]
    sizes = torch.bincount(region)
    start = (sizes.cumsum(0) - sizes)[region[order]]
    rank = torch.arange(len(order), device=order.device) - start
    return order[rank < count]


def _numbered(root: Tensor) -> Tensor:
    numbered: Tensor = torch.unique(root, return_inverse=True)[1]
    return numbered
