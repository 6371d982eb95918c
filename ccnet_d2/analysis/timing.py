"""Timing calls."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The median wall-clock time of a call, after one call that is not counted.

    Args:
        function: what to call.
        device: where it computes; a GPU is waited for.
        repeats: number of calls.
    """

    def seconds() -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return statistics.median(seconds() for _ in range(repeats))
