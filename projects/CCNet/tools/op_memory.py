"""Peak memory of the candidates that benchmark_op.py compares."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from op_candidates import PASSES, Case
from op_meters import MEGA, MemoryMeter

Figures = dict[str, float | None]


def peaks(case: Case) -> list[tuple[str, str, Figures]]:
    """Candidate, pass and megabytes of the attention functions, and of training steps of the layers.

    On CPU measured in a process of its own. One that has worked before holds free memory, which a call may use without
    the system's noticing; and from one that measures memory freed tensors go back at once, so that it is slower.

    Raises:
        RuntimeError: the process ended before it was done.
    """
    if case.device.type != "cpu":
        return peaks_here(case)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        try:
            return process.submit(peaks_here, case).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"The process that measures the memory of {case.name} ended before it was done, as where the system "
                "runs out of memory: leave out non-local attention (--no-non-local), or choose smaller --sizes."
            ) from error


def peaks_here(case: Case) -> list[tuple[str, str, Figures]]:
    """`peaks`, measured in this process."""
    meter = MemoryMeter(case.device)
    found: list[tuple[str, str, Figures]] = []
    output = case.batch * case.channels * math.prod(case.sizes) * case.dtype.itemsize / MEGA
    for what in PASSES:
        for name, call in case.core_calls(backward=what != "forward").items():
            found.append((name, what, {"mb": meter.peak(call), "output_mb": output}))
    loops = case.loops()
    what = f"training step, R={case.arguments.recurrence} (non-local: once)"
    steps: dict[str, Callable[..., dict[str, Callable[[], object]]]] = {
        what: lambda modules: case.module_calls(modules, backward=True),
        f"{what}, in a network": case.steps_in_a_network,
    }
    for what, calls_of in steps.items():
        for name, call in calls_of(loops).items():
            found.append((name, what, {"mb": meter.peak(call)}))
    return found
