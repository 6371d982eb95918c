"""The mean of a loss over the pixels of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_processes(total: Tensor, mass: Tensor) -> Tensor:
    """What this process adds to the mean over the pixels of all processes, times their number.

    `DistributedDataParallel` averages gradients over processes: with `total / mass` on each, a pixel of a process
    that has few labels would count more than one of a process that has many. With this, the average of losses and
    gradients over the processes is that of one process with the whole batch. Without a gradient to take, or outside
    `torch.distributed`, it is `total / mass` of this process. Processes must call it equally often.

    Args:
        total: scalar, this process's sum over its pixels.
        mass: scalar, the pixels' number or their summed weights; 0 where there is none, in which case `total` is 0.

    Returns:
        Scalar of `total`'s dtype: number of processes * total / (mass of all processes), or 0 with a graph.
    """
    mass = mass.detach().to(torch.promote_types(total.dtype, torch.float32))
    processes = 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        processes = dist.get_world_size()
        if processes > 1:
            mass = mass.double()  # adding up counts stays exact
            dist.all_reduce(mass)
    return total * processes / torch.where(mass > 0, mass, 1.0).to(total.dtype)


def balanced_mean_over_processes(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Half the mean over one kind of pixels plus half the mean over another, each as of `mean_over_processes`.

    That is the mean weighted by the share that the other kind has. Of a kind without pixels nothing is left.

    Args:
        values: of each pixel.
        first, second: bool, of the same shape.

    Returns:
        Scalar of `values`'s dtype.
    """
    halves = [mean_over_processes((values * kind).sum(), kind.sum()) for kind in (first, second)]
    return 0.5 * (halves[0] + halves[1])
