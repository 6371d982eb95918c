"""Loader workers that are forked, as those of Detectron2's loaders always were on Linux."""

import sys
from typing import Any

import torch.multiprocessing as multiprocessing
from torch.utils.data import DataLoader

__all__ = ["fork_workers"]


def fork_workers(loader: Any) -> Any:
    """Have the workers of a loader forked on Linux, unless another start method was chosen for it or for all.

    From Python 3.14 on, a server process would start them: each would import everything anew and be sent a copy of the
    data set, where forked ones share it, and a data set or mapper that cannot be pickled would be refused.

    Args:
        loader: changed in place if it is a `DataLoader` with workers.

    Returns:
        The loader.
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.multiprocessing_context is None:
        chosen = multiprocessing.get_start_method(allow_none=True)
        # "forkserver" is also what it says once something used Python's default.
        if sys.platform == "linux" and chosen in (None, "forkserver"):
            loader.multiprocessing_context = "fork"
    return loader
