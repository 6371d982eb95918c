"""Clock, memory meter and attainable rates of the device that benchmark_op.py measures on."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from attention_formulations import operator_elements, operator_flops
from gpu_timing import Recording, device_seconds

MEGA = 1e6
CACHE_FILLER_BYTES = 2**28  # several times the largest GPU's second-level cache


class Timer:
    """How long a call takes, by the clock of the device that works."""

    def __init__(self, device: torch.device, *, eager: bool = False) -> None:
        """
        Args:
            device: where the calls work.
            eager: on a GPU, time calls as Python makes them instead of recorded ones.
        """
        self.device = device
        self._records = device.type == "cuda" and not eager
        self._cache_filler = None
        if device.type == "cuda":
            self._cache_filler = torch.empty(CACHE_FILLER_BYTES, dtype=torch.int8, device=device)

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        """The form in which a call is timed again and again."""
        return Recording([call]).replay if self._records else call

    def once(self, call: Callable[[], object]) -> float:
        """Seconds that one call takes."""
        if self._cache_filler is not None:
            return device_seconds(call, before=self._cache_filler.zero_)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def compare(self, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Median seconds of each call; they take turns until the time is used up, at least three times each.

        A turn is one call that is not counted and two that are: memory that the candidate before gave back to the
        system, and caches that it filled, are not the next one's to pay for. A call that alone would use up the time
        is made twice, one after the other, and the second one counts.
        """
        calls = {name: self.prepare(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        slow = set()
        for name, call in calls.items():
            if self.once(call) > seconds / 4:
                again = self.once(call)
                if again > seconds / 4:
                    slow.add(name)
                    times[name].append(again)
        start = time.perf_counter()
        for turn in range(1000):
            for name, call in calls.items():
                if name not in slow:
                    call()
                    times[name] += [self.once(call), self.once(call)]
            if turn >= 2 and time.perf_counter() - start > seconds:
                break
        return {name: statistics.median(values) for name, values in times.items()}


class MemoryMeter:
    """Peak memory of a call above what is held when it starts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.available = True
        if device.type == "cpu":
            self.available = os.access("/proc/self/clear_refs", os.W_OK)
            if self.available:
                # Freed tensors go back to the system at once, or their pages would hide what the next call needs.
                libc = ctypes.CDLL(None)
                m_trim_threshold, m_mmap_threshold = -1, -3
                self.available = bool(
                    libc.mallopt(m_mmap_threshold, 65536) and libc.mallopt(m_trim_threshold, 65536)
                )

    def peak(self, call: Callable[[], object]) -> float | None:
        """Megabytes at the peak of a second call; None where that cannot be measured."""
        if not self.available:
            return None
        call()  # what libraries allocate once and keep is not the call's own
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            result = call()
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = self._status("VmRSS")
            result = call()
            peak = self._status("VmHWM")
        del result
        return (peak - before) / MEGA

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}.")


class Machine:
    """What the floors are computed from."""

    def __init__(self, timer: Timer, seconds: float) -> None:
        self.timer = timer
        self.seconds = seconds
        self._flops: dict[torch.dtype, float] = {}
        self.bytes_per_second = 0.0

    def measure(self, dtype: torch.dtype) -> None:
        """Measure again; the best figures of the run count, another program may have been busy at one moment."""
        device = self.timer.device
        n = 8192 if device.type == "cuda" else 2048
        multiplied = self._multiplied(dtype)
        a, b = (torch.randn(n, n, device=device).to(multiplied) for _ in range(2))
        products = [lambda: torch.matmul(a, b)]
        if device.type == "cpu":
            # The same by another library, which is the faster one on processors that are not Intel's.
            maps, weight = a.view(1, -1, n // 32, 32), b.view(n, n, 1, 1)
            maps, weight = (x.contiguous(memory_format=torch.channels_last) for x in (maps, weight))
            products.append(lambda: torch.nn.functional.conv2d(maps, weight))
        rate = 2 * n**3 / min(map(self._best, products))
        self._flops[dtype] = max(rate, self._flops.get(dtype, 0.0))
        source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
        target = torch.empty_like(source)
        rate = 2 * 4 * source.numel() / self._best(lambda: target.copy_(source))
        self.bytes_per_second = max(rate, self.bytes_per_second)

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """The rate of the fastest large product in this dtype."""
        if dtype not in self._flops:
            self.measure(dtype)
        return self._flops[dtype]

    def floors(
        self, batch: int, key_channels: int, channels: int, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[float, float]:
        """Least seconds of the attention core, forward and forward + backward."""
        result = []
        for flops, elements in zip(
            operator_flops(batch, key_channels, channels, sizes),
            operator_elements(batch, key_channels, channels, sizes),
            strict=True,
        ):
            result.append(
                max(flops / self.flops_per_second(dtype), elements * dtype.itemsize / self.bytes_per_second)
            )
        return result[0], result[0] + result[1]

    def _multiplied(self, dtype: torch.dtype) -> torch.dtype:
        """What a large product of this dtype is measured in: fp32 on CPUs without units for half precision.

        PyTorch multiplies there one number at a time, tens of times slower than fp32; a product large enough for a rate
        would take half a minute.
        """
        if self.timer.device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
            return dtype
        native, single = (self._small_product(candidate) for candidate in (dtype, torch.float32))
        return torch.float32 if native > 8 * single else dtype

    def _small_product(self, dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)
        return min(self.timer.once(lambda: a @ a) for _ in range(3))

    def _best(self, call: Callable[[], object]) -> float:
        self.timer.once(call)
        start, best = time.perf_counter(), math.inf
        while time.perf_counter() - start < self.seconds:
            best = min(best, self.timer.once(call))
        return best
