"""How long a GPU works, by its own clock: calls recorded as CUDA graphs, without the gaps that Python leaves between
kernels."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


class Recording:
    """Calls recorded as one CUDA graph: a replay does the same work on the same memory.

    Holds the memory of the calls, results included, as long as it lives.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        """
        Args:
            calls: made twice, once to let libraries load and choose their kernels. None may wait for the device.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [call() for call in calls]

    def replay(self) -> None:
        """Does the work again; returns at once."""
        self._graph.replay()


def device_seconds(call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds from the beginning of the call's work on the current stream to its end.

    Args:
        call: what is timed.
        before: work that precedes it and is not counted. While the device is busy with that, the host gets ahead.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(call: Callable[[], object], repeats: int, most_seconds: float = 10.0) -> float:
    """Median of `device_seconds` after three calls that do not count; slow calls are repeated less often."""
    begin = time.perf_counter()
    times: list[float] = []
    for i in range(3 + repeats):
        seconds = device_seconds(call)
        if i >= 3 or seconds > most_seconds / 10:
            times.append(seconds)
        if len(times) >= 3 and time.perf_counter() - begin > most_seconds:
            break
    return statistics.median(times)
