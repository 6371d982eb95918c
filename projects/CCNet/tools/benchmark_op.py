#!/usr/bin/env python3
"""Measure criss-cross attention: speed, memory, the way to the machine's limits, and growth with the image.

Each backend of the operator beside the textbook formulation in PyTorch (permuted copies, bmm, concatenation, softmax)
and non-local attention, as the attention core alone (every formulation gets the memory layout it is made for:
channels-last for the backends, NCHW for the others) and as the whole layer with its projections, NCHW in and out;
forward, and forward + backward. All candidates of a case take turns within one run, and the medians are compared. The
floor is the larger of arithmetic at the speed of a large matrix product (on CPU of a 1x1 convolution where that is
faster) and memory traffic at the speed of a large copy, all measured in the same run.

On a GPU a call is recorded as a CUDA graph and timed by the device's clock, its inputs no longer in the cache: what the
host needs to launch the kernels is not in the figures (with --eager it is). TF32 is off there.

Examples:
    python projects/CCNet/tools/benchmark_op.py
    python projects/CCNet/tools/benchmark_op.py --dtype float32 --sizes 97x97 5x63x63 --seconds 4 --only core
    python projects/CCNet/tools/benchmark_op.py --device cuda --json bench.json --plot bench.png
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ccnet_d2.ops.compiled import instruction_set
from ccnet_d2.script_exit import exit_with
from op_arguments import backends_on, parse_arguments
from op_candidates import DTYPES, PASSES, Case
from op_memory import peaks
from op_meters import Machine, Timer
from op_report import Row, fit_exponent, plot, render_rows

GROWTH_SIZES = (32, 48, 64, 96, 128, 192, 256)


class Benchmark:
    """Runs the sections and collects rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.timer = Timer(self.device, eager=arguments.eager)
        self.machine = Machine(self.timer, min(0.3, arguments.seconds))
        self.rows: list[Row] = []
        self.growth: list[Row] = []

    def cases(self) -> list[Case]:
        """Every size in every dtype that was asked for."""
        return [
            Case(self.arguments, sizes, DTYPES[name])
            for name in self.arguments.dtype
            for sizes in self.arguments.sizes
        ]

    def add(self, section: str, case: Case, candidate: str, what: str, **figures: object) -> None:
        """A row of a section: one candidate in one pass, `what`, of a case."""
        dtype = str(case.dtype).removeprefix("torch.")
        row = {
            "section": section,
            "size": case.name,
            "dtype": dtype,
            "candidate": candidate,
            "pass": what,
            **figures,
        }
        self.rows.append(row)

    def core(self, case: Case) -> None:
        """Times of the attention functions, beside the textbook form's and the floor."""
        self.machine.measure(case.dtype)
        floors = self.machine.floors(case.batch, case.key_channels, case.channels, case.sizes, case.dtype)
        for what, floor in zip(PASSES, floors, strict=True):
            times = self.timer.compare(case.core_calls(backward=what != "forward"), self.arguments.seconds)
            for name, seconds in times.items():
                to_floor = None if name.startswith("non-local") else seconds / floor
                speedup = times["textbook"] / seconds
                self.add("core", case, name, what, ms=seconds * 1e3, speedup=speedup, to_floor=to_floor)

    def module(self, case: Case) -> None:
        """Times of the whole layers, beside the textbook form's."""
        modules = case.modules()
        for what in PASSES:
            times = self.timer.compare(
                case.module_calls(modules, backward=what != "forward"), self.arguments.seconds
            )
            for name, seconds in times.items():
                self.add("module", case, name, what, ms=seconds * 1e3, speedup=times["textbook"] / seconds)

    def memory(self, case: Case) -> None:
        """Peak memory of the attention functions, and of training steps of the layers, in megabytes."""
        for name, what, figures in peaks(case):
            self.add("memory", case, name, what, **figures)

    def threads(self, case: Case) -> None:
        """How much faster all threads are than one."""
        most = torch.get_num_threads()
        if self.device.type != "cpu" or most < 2 or "compiled" not in self.arguments.backends:
            return
        for what in PASSES:
            call = case.core_calls(backward=what != "forward")["compiled"]
            times: dict[int, list[float]] = {1: [], most: []}
            start = time.perf_counter()
            while time.perf_counter() - start < self.arguments.seconds or len(times[1]) < 4:
                for count in times:
                    torch.set_num_threads(count)
                    call()
                    times[count].append(self.timer.once(call))
            torch.set_num_threads(most)
            one, many = (statistics.median(times[count]) for count in (1, most))
            self.add(
                "threads", case, f"compiled, {most} threads to 1", what, ms=many * 1e3, speedup=one / many
            )

    def run_growth(self) -> None:
        """Time over N, and the exponent of the power law fitted to it."""
        best = self.arguments.backends[0]
        for dtype in self.arguments.dtype:
            for what in PASSES:
                points = []
                for size in GROWTH_SIZES:
                    case = Case(self.arguments, (size, size), DTYPES[dtype])
                    call = case.core_calls(backward=what != "forward")[best]
                    seconds = self.timer.compare({best: call}, self.arguments.seconds / 4)[best]
                    points.append((size * size, seconds))
                exponent = fit_exponent(points)
                self.growth.append(
                    {"candidate": best, "dtype": dtype, "pass": what, "exponent": exponent, "points": points}
                )

    def run(self) -> None:
        """Measure and print the sections that were asked for."""
        for section in ("core", "module", "memory", "threads"):
            if section in self.arguments.only:
                for case in self.cases():
                    getattr(self, section)(case)
                    rows = [row for row in self.rows if row["section"] == section]
                    if rows:
                        print(render_rows(rows, case), flush=True)
        if "growth" in self.arguments.only:
            self.run_growth()
            for series in self.growth:
                print(
                    f"growth of {series['candidate']}, {series['dtype']}, {series['pass']}: "
                    f"time ~ N^{series['exponent']:.2f}"
                )

    def kernels(self) -> dict[str, str | None]:
        """For each dtype what the compiled operator's kernels are chosen by: the processor's instructions, or the
        GPU's compute capability."""
        if self.device.type == "cuda":
            capability = "compute capability {}.{}".format(*torch.cuda.get_device_capability(self.device))
            return dict.fromkeys(self.arguments.dtype, capability)
        return {name: instruction_set(DTYPES[name]) for name in self.arguments.dtype}

    def environment(self) -> dict[str, object]:
        """What the figures depend on."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "device": self.arguments.device,
            "processor": gpu or _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": self.kernels(),
            "gflops": {
                name: self.machine.flops_per_second(DTYPES[name]) / 1e9 for name in self.arguments.dtype
            },
            "gb_per_second": self.machine.bytes_per_second / 1e9,
            "batch": self.arguments.batch,
            "channels": self.arguments.channels,
            "key_channels": self.arguments.channels // self.arguments.reduction,
        }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def choose_device(name: str) -> None:
    """Make a GPU the current one, and its fp32 exact."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parse_arguments(argv, __doc__.partition("\n")[0])
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    choose_device(arguments.device)
    benchmark = Benchmark(arguments)
    environment = benchmark.environment()
    print(
        f"{environment['processor']}, {environment['threads']} threads, torch {environment['torch']}; "
        f"B={arguments.batch} C={environment['channels']} C'={environment['key_channels']} "
        f"energies +-{arguments.energy_std:g}; "
        f"copy {environment['gb_per_second']:.1f} GB/s; matrix product "
        + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in environment["gflops"].items())
        + f"; kernels {environment['kernels']}"
    )
    for backend, reason in backends_on(arguments.device).items():
        if reason is not None:
            print(f"The backend {backend} is left out: {reason}")
    benchmark.run()
    if arguments.json:
        report = {"environment": environment, "rows": benchmark.rows, "growth": benchmark.growth}
        partial = arguments.json.with_name(arguments.json.name + ".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(arguments.json)
    if arguments.plot:
        plot(benchmark.rows, benchmark.growth, arguments.plot)
    return 0


if __name__ == "__main__":
    exit_with(main)
