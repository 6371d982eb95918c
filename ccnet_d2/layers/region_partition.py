"""From "these two pixels belong together" to regions (RANet, Sec. 3.1), and each region's representatives (Sec. 3.2).

Shapes: N pixels of an image, Q regions, S representatives; "..." any axes in front, for instance the images of a batch.
"""

import torch
from torch import Tensor

_JUMPS = 10  # of the released code


def connected_regions(together: Tensor) -> Tensor:
    """Regions as connected components: two pixels share one if a chain of pairs leads from one to the other.

    Args:
        together: (..., N, N) bool, symmetric; the diagonal does not matter.

    Returns:
        (..., N) int64, regions 0 to Q - 1, numbered in the order of their first pixels.
    """
    pixels = together.shape[-1]
    parent = torch.arange(pixels, device=together.device).repeat(*together.shape[:-2], 1)
    beyond = torch.tensor(pixels, dtype=torch.int32, device=together.device)
    while True:
        # Every pixel looks for the smallest root next to it, roots are hung under what their pixels found, and paths
        # are shortened: by half with each jump, of which a fixed number keeps a GPU from being waited for. Roots only
        # get smaller, so this ends, after some log N rounds.
        nearest = torch.where(together, parent.int()[..., None, :], beyond).amin(-1)
        found = torch.minimum(parent, nearest.long())
        hung = parent.scatter_reduce(-1, parent, found, "amin")
        hung = torch.minimum(hung, found)
        for _ in range((pixels - 1).bit_length()):
            hung = hung.gather(-1, hung)
        if torch.equal(hung, parent):
            return _numbered(parent)
        parent = hung


def pointer_regions(together: Tensor) -> Tensor:
    """Regions as in the released code: each pixel points to the first one it belongs with; then ten jumps.

    A pixel i points to the smallest j <= i with `together[i, j]`, itself if there is none.

    Args:
        together: (..., N, N) bool.

    Returns:
        (..., N) int64, regions 0 to Q - 1, numbered in the order of the pixels pointed to.
    """
    own = torch.eye(together.shape[-1], dtype=torch.bool, device=together.device)
    pointer = (together | own).int().argmax(-1)  # the first of the largest; never behind i itself
    for _ in range(_JUMPS):
        pointer = pointer.gather(-1, pointer)
    return _numbered(pointer)


def join_small_regions(region: Tensor, attention: Tensor, count: int) -> Tensor:
    """Each pixel of a region of fewer than `count` pixels goes to the larger region that it belongs with most.

    That is the region of the pixel for which its attention score is the highest (in a tie the first one). An image
    without any region of that size stays as it is.

    Args:
        region: (..., N) regions, 0 to Q - 1.
        attention: (..., N, N) symmetric scores of belonging together.
        count: pixels that a region must have.

    Returns:
        (..., N) int64, regions 0 to Q' - 1, in the same order.
    """
    sizes = torch.zeros_like(region).scatter_add(-1, region, torch.ones_like(region))
    large = sizes.gather(-1, region) >= count
    target = attention.masked_fill(~large[..., None, :], -torch.inf).argmax(-1)
    settled = large | ~large.any(-1, keepdim=True)
    return _numbered(torch.where(settled, region, region.gather(-1, target)))


def representatives(region: Tensor, score: Tensor, count: int) -> tuple[Tensor, ...]:
    """The pixels of the highest scores in each region.

    A region of fewer than `count` pixels is represented by all of them; of equal scores the first pixel counts more.

    Args:
        region: (B, N) regions of B images, 0 to Q - 1.
        score: (B, N), J of Eq. 5.
        count: K.

    Returns:
        (S,) pixels of each image, by region and there from the highest score on.
    """
    images, pixels = region.shape
    # All images as one, whose regions are told apart by where they begin: a GPU is waited for twice, not at each image.
    start = pixels * torch.arange(images, device=region.device)
    name = (region + start[:, None]).flatten()
    order = score.detach().flatten().argsort(descending=True, stable=True)
    order = order[name[order].argsort(stable=True)]
    sizes = torch.zeros_like(name).scatter_add(0, name, torch.ones_like(name))
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[name[order]]
    counts = sizes.clamp(max=count).reshape(images, pixels).sum(1).tolist()
    return tuple(cells % pixels for cells in order[rank < count].split(counts))


def _numbered(names: Tensor) -> Tensor:
    """(..., N) integers from 0 to N - 1 that name regions -> the same regions, named 0 to Q - 1 in the same order."""
    # Without `unique`, which would make a GPU wait for each image.
    used = torch.zeros_like(names).scatter(-1, names, 1)
    return (used.cumsum(-1) - 1).gather(-1, names)
