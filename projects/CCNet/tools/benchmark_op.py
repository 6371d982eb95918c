#!/usr/bin/env python3
"""Measure criss-cross attention: speed, memory, the way to the machine's limits, and growth with the image.

Each backend of the operator beside the textbook formulation in PyTorch (permuted copies, bmm, concatenation, softmax)
and non-local attention, as the attention core alone (every formulation gets the memory layout it is made for:
channels-last for the backends, NCHW for the others) and as the whole layer with its projections, NCHW in and out;
forward, and forward + backward. All candidates of a case take turns within one run, and the medians are compared. The
floor is the larger of arithmetic at the speed of a large matrix product (on CPU of a 1x1 convolution where that is
faster) and memory traffic at the speed of a large copy, all measured in the same run.

On a GPU a call is recorded as a CUDA graph and timed by the device's clock, its inputs no longer in the cache: what the
host needs to launch the kernels is not in the figures (with --eager it is). fp32 is exact fp32 there, TF32 is off.

Examples:
    python projects/CCNet/tools/benchmark_op.py
    python projects/CCNet/tools/benchmark_op.py --dtype float32 --sizes 97x97 5x63x63 --seconds 4 --only core
    python projects/CCNet/tools/benchmark_op.py --device cuda --json bench.json --plot bench.png
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attention_formulations import (
    RecurrentModule,
    TextbookModule,
    non_local_attention,
    non_local_sdpa,
    operator_attention,
    operator_elements,
    operator_flops,
    textbook_attention,
)
from ccnet_d2.layers import RCCA
from ccnet_d2.ops import BACKENDS, available_backends
from ccnet_d2.ops.compiled import instruction_set, unavailable_reason
from ccnet_d2.script_exit import exit_with
from gpu_timing import Recording, device_seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECTIONS = ("core", "module", "memory", "threads", "growth")
PASSES = ("forward", "forward+backward")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
GROWTH_SIZES = (32, 48, 64, 96, 128, 192, 256)
MEGA = 1e6
NCHW_CORE = "compiled, NCHW"
RECOMPUTE = "compiled, recompute"
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
        is made twice, the first time to warm up.
        """
        calls = {name: self.prepare(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        warm = {name: self.once(call) for name, call in calls.items()}
        start = time.perf_counter()
        slow = {name for name in calls if warm[name] > seconds / 4}
        for turn in range(1000):
            for name, call in calls.items():
                if name in slow:
                    if turn == 0:
                        times[name].append(self.once(call))
                    continue
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
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
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

    def _best(self, call: Callable[[], object]) -> float:
        self.timer.once(call)
        start, best = time.perf_counter(), math.inf
        while time.perf_counter() - start < self.seconds:
            best = min(best, self.timer.once(call))
        return best


class Case:
    """One size and dtype: inputs, and calls for every candidate."""

    def __init__(self, arguments: argparse.Namespace, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self.arguments, self.sizes, self.dtype = arguments, sizes, dtype
        self.device = torch.device(arguments.device)
        self.channels = arguments.channels
        self.key_channels = arguments.channels // arguments.reduction
        self.batch = arguments.batch

    @property
    def name(self) -> str:
        return "x".join(map(str, self.sizes))

    def tensor(self, channels: int, *, scale: float = 1.0) -> Tensor:
        return (torch.randn(self.batch, channels, *self.sizes, device=self.device) * scale).to(self.dtype)

    def non_local_fits(self) -> bool:
        """Whether N x N weights, several times, stay within a quarter of the memory."""
        needed = 5 * self.batch * math.prod(self.sizes) ** 2 * self.dtype.itemsize
        if self.device.type == "cuda":
            return needed < torch.cuda.mem_get_info(self.device)[1]
        return needed < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4

    def cores(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The attention functions to compare, the textbook one first."""
        found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"textbook": textbook_attention}
        found |= {backend: operator_attention(backend) for backend in self.arguments.backends}
        if self.arguments.non_local:
            if self.non_local_fits():
                found["non-local"] = non_local_attention
            found["non-local SDPA"] = non_local_sdpa
        return found

    def modules(self) -> dict[str, nn.Module]:
        """The layers to compare, the textbook one first."""
        dims, reduction = len(self.sizes), self.arguments.reduction
        found: dict[str, nn.Module] = {
            name: TextbookModule(self.channels, reduction, dims, attention)
            for name, attention in self.cores().items()
            if name not in BACKENDS
        }
        layers = {backend: (backend, False) for backend in self.arguments.backends}
        if "compiled" in layers:
            layers[RECOMPUTE] = ("compiled", True)
        for name, (backend, recompute) in layers.items():
            layer = RCCA(self.channels, 1, dims, reduction=reduction, backend=backend, recompute=recompute)
            nn.init.ones_(layer.gamma)
            found[name] = layer
        order = [
            "textbook",
            *layers,
            *(name for name in found if name.startswith("non-local")),
        ]
        return {name: found[name].to(self.device, self.dtype) for name in order}

    def core_calls(self, *, backward: bool) -> dict[str, Callable[[], object]]:
        # At a deviation of 1 the softmax is neither flat nor a maximum.
        scale = math.sqrt(self.arguments.energy_std) * self.key_channels**-0.25
        query, key = (self.tensor(self.key_channels, scale=scale) for _ in range(2))
        tensors = (query, key, self.tensor(self.channels), self.tensor(self.channels))
        layouts = {False: tensors, True: tuple(_channels_last(x) for x in tensors)}
        calls = {}
        for name, function in self.cores().items():
            *inputs, grad = layouts[name in BACKENDS]
            calls[name] = _call(function, inputs, inputs, grad, backward=backward)
            if name == "compiled":
                *inputs, grad = tensors
                calls[NCHW_CORE] = _call(function, inputs, inputs, grad, backward=backward)
        return calls

    def module_calls(
        self, modules: dict[str, nn.Module], *, backward: bool
    ) -> dict[str, Callable[[], object]]:
        x, grad = self.tensor(self.channels), self.tensor(self.channels)
        return {
            name: _call(module, [x], [x, *module.parameters()], grad, backward=backward)
            for name, module in modules.items()
        }


def _channels_last(x: Tensor) -> Tensor:
    """The same values, the channels of a position side by side in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _call(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    wanted: list[Tensor],
    grad: Tensor,
    *,
    backward: bool,
) -> Callable[[], object]:
    for x in wanted:
        x.requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), wanted, grad)

    return forward_backward if backward else forward


class Benchmark:
    """Runs the sections and collects rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.timer = Timer(self.device, eager=arguments.eager)
        self.machine = Machine(self.timer, min(0.3, arguments.seconds))
        self.rows: list[dict[str, object]] = []
        self.growth: list[dict[str, object]] = []

    def cases(self) -> list[Case]:
        return [
            Case(self.arguments, sizes, DTYPES[d])
            for d in self.arguments.dtype
            for sizes in self.arguments.sizes
        ]

    def add(self, section: str, case: Case, candidate: str, what: str, **figures: object) -> None:
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
        self.machine.measure(case.dtype)
        floors = self.machine.floors(case.batch, case.key_channels, case.channels, case.sizes, case.dtype)
        for what, floor in zip(PASSES, floors, strict=True):
            times = self.timer.compare(case.core_calls(backward=what != "forward"), self.arguments.seconds)
            for name, seconds in times.items():
                to_floor = None if name.startswith("non-local") else seconds / floor
                speedup = times["textbook"] / seconds
                self.add("core", case, name, what, ms=seconds * 1e3, speedup=speedup, to_floor=to_floor)

    def module(self, case: Case) -> None:
        modules = case.modules()
        for what in PASSES:
            times = self.timer.compare(
                case.module_calls(modules, backward=what != "forward"), self.arguments.seconds
            )
            for name, seconds in times.items():
                self.add("module", case, name, what, ms=seconds * 1e3, speedup=times["textbook"] / seconds)

    def memory(self, case: Case) -> None:
        meter = MemoryMeter(self.device)
        for what in PASSES:
            for name, call in case.core_calls(backward=what != "forward").items():
                output = case.batch * case.channels * math.prod(case.sizes) * case.dtype.itemsize / MEGA
                self.add("memory", case, name, what, mb=meter.peak(call), output_mb=output)
        loops = {
            # Non-local attention sees everything at once.
            name: module
            if name.startswith("non-local")
            else RecurrentModule(module, self.arguments.recurrence)
            for name, module in case.modules().items()
        }
        what = f"training step, R={self.arguments.recurrence} (non-local: once)"
        for name, call in case.module_calls(loops, backward=True).items():
            self.add("memory", case, name, what, mb=meter.peak(call))

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


def fit_exponent(points: list[tuple[int, float]]) -> float:
    """The slope of log(time) over log(N), by least squares."""
    x = [math.log(n) for n, _ in points]
    y = [math.log(seconds) for _, seconds in points]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def render_rows(rows: list[dict[str, object]], case: Case) -> str:
    """The rows of one case as a table."""
    dtype = str(case.dtype).removeprefix("torch.")
    rows = [row for row in rows if row["size"] == case.name and row["dtype"] == dtype]
    if not rows:
        return ""
    columns = ("pass", "candidate", "ms", "speedup", "to_floor", "mb")
    heads = ("", "", "ms", "x textbook", "x floor", "peak MB")
    shown = [i for i, column in enumerate(columns) if any(row.get(column) is not None for row in rows)]
    table = [[heads[i] for i in shown]]
    for row in rows:
        table.append([_cell(row.get(columns[i])) for i in shown])
    widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
    lines = [
        "  ".join(
            cell.ljust(width) if columns[shown[i]] in ("pass", "candidate") else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return f"\n{rows[0]['section']}: {case.name}, {dtype}\n" + "\n".join(lines)


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def plot(benchmark: Benchmark, path: Path) -> None:
    """Bars of the speed-up over the textbook form, and growth with N, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [section for section in ("core", "module") if section in benchmark.arguments.only]
    count = len(panels) + bool(benchmark.growth)
    figure, axes = pyplot.subplots(1, count, figsize=(6.5 * count, 4.5), squeeze=False)
    for axis, section in zip(axes[0], panels, strict=False):
        rows = [row for row in benchmark.rows if row["section"] == section]
        groups = list(dict.fromkeys((row["dtype"], row["size"], row["pass"]) for row in rows))
        names = [name for name in dict.fromkeys(row["candidate"] for row in rows) if name != "textbook"]
        for i, name in enumerate(names):
            points = [
                (
                    groups.index((row["dtype"], row["size"], row["pass"])) + (i + 0.5) * 0.8 / len(names),
                    row["speedup"],
                )
                for row in rows
                if row["candidate"] == name
            ]
            axis.barh([p[0] for p in points], [p[1] for p in points], height=0.8 / len(names), label=name)
        axis.axvline(1.0, color="black", linewidth=0.8)
        labels = [f"{size} {dtype}\n{what}" for dtype, size, what in groups]
        axis.set_yticks([g + 0.4 for g in range(len(groups))], labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("times as fast as the textbook form")
        axis.set_title("attention core" if section == "core" else "whole layer, NCHW in and out")
        # Below: bars may fill the panel.
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(names))
    for series in benchmark.growth:
        axis = axes[0][-1]
        label = f"{series['dtype']} {series['pass']}: N^{series['exponent']:.2f}"
        axis.loglog(*zip(*((n, 1e3 * s) for n, s in series["points"]), strict=True), marker="o", label=label)
        axis.set_xlabel("number of positions N")
        axis.set_ylabel("ms")
        axis.set_title("growth")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "97x97" -> (97, 97)."""
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: write one to three numbers, for example 97x97."
        )
    return sizes


def parse_count(text: str) -> int:
    """ "3" -> 3."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on.")
    return int(text)


def parse_device(text: str) -> str:
    """The name of a device that this machine has: "cpu", "cuda" or "cuda:1"."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or text == kind):
        raise argparse.ArgumentTypeError(f"{text!r} is no device to measure: write cpu, cuda or cuda:0.")
    found = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= found:
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {found} of this kind here.")
    return text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--device",
        type=parse_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    sizes = [(64, 64), (97, 97), (128, 256)]
    parser.add_argument("--sizes", nargs="+", type=parse_sizes, default=sizes, metavar="HxW", help="or TxHxW")
    parser.add_argument("--batch", type=parse_count, default=1)
    parser.add_argument("--channels", type=parse_count, default=512)
    parser.add_argument("--reduction", type=parse_count, default=8, help="C' = channels / reduction")
    parser.add_argument(
        "--recurrence", type=parse_count, default=2, help="R of the training step in the memory section"
    )
    parser.add_argument(
        "--energy-std",
        type=float,
        default=1.0,
        help="standard deviation of the core's energies; from 16 on most weights underflow",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all that run here")
    parser.add_argument("--no-non-local", dest="non_local", action="store_false")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--threads", type=parse_count, help="CPU threads (torch's default otherwise)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison")
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU: time with what Python takes to launch the kernels"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"write a picture there ({', '.join(PLOT_SUFFIXES)})"
    )
    arguments = parser.parse_args(argv)
    if arguments.channels % arguments.reduction:
        parser.error(
            f"--channels {arguments.channels} is not divisible by --reduction {arguments.reduction}."
        )
    if not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds {arguments.seconds} must be a finite number above 0.")
    if arguments.plot is not None and arguments.plot.suffix not in PLOT_SUFFIXES:
        parser.error(f"--plot {arguments.plot} must end in one of {', '.join(PLOT_SUFFIXES)}.")
    if arguments.plot is not None and not set(arguments.only) & {"core", "module", "growth"}:
        parser.error("--plot needs one of the sections core, module and growth.")
    if not 0 <= arguments.energy_std < math.inf:
        parser.error(f"--energy-std {arguments.energy_std} must be a finite number, 0 or more.")
    reasons = backends_on(arguments.device)
    for backend in arguments.backends or ():
        if reasons[backend] is not None:
            parser.error(f"the backend {backend} does not run here: {reasons[backend]}")
    arguments.backends = arguments.backends or [name for name in BACKENDS if reasons[name] is None]
    return arguments


def backends_on(device: str) -> dict[str, str | None]:
    """For each backend why it does not run on the device, as one sentence; None where it does."""
    return available_backends() | {"compiled": unavailable_reason(torch.device(device).type)}


def choose_device(name: str) -> None:
    """Makes a GPU the current one, and its fp32 exact."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parse_arguments(argv)
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    choose_device(arguments.device)
    for path in (arguments.json, arguments.plot):  # before minutes are spent on what would then be lost
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
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
        plot(benchmark, arguments.plot)
    return 0


if __name__ == "__main__":
    exit_with(main)
