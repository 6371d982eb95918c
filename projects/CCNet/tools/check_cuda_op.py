#!/usr/bin/env python
"""Check and time the CUDA kernels of criss-cross attention on the GPU of this machine.

    python projects/CCNet/tools/check_cuda_op.py                       # 500 cases, then times
    python projects/CCNet/tools/check_cuda_op.py --large --json op.json
    compute-sanitizer --tool memcheck  python projects/CCNet/tools/check_cuda_op.py --cases 60 --no-timing
    compute-sanitizer --tool racecheck python projects/CCNet/tools/check_cuda_op.py --cases 30 --no-timing

Builds nothing: the CUDA library must be there (`python -m ccnet_d2.collect_env` says whether it is).

Checked, for drawn shapes, strides and dtypes: outputs and gradients against a float64 oracle built from an explicit
neighbour mask, and against the error of the textbook form in the same precision; bitwise equality between
runs; memory that the kernels should write filled with NaN before. Timed, as replays of CUDA graphs over several sets of
inputs: the kernels, the matmul backend and the textbook form, beside the floor that follows from the bandwidth and
the matrix rate measured in the same run.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes, N number of positions.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attention_formulations import operator_elements, operator_flops, textbook_attention
from ccnet_d2.ops import compiled, matmul, reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
NAMES = ("out", "grad_query", "grad_key", "grad_value")
# Relative errors in the Frobenius norm that are allowed: times the textbook form's error in the same precision, and in
# fp32 at least this much.
FACTOR = {"out": 2.0, "grad_query": 3.0, "grad_key": 3.0, "grad_value": 3.0}
TOLERANCE = {"out": 1e-5, "grad_query": 3e-5, "grad_key": 3e-5, "grad_value": 3e-5}
# Where the textbook form happens to be exact, a few roundings are still allowed.
HALF_LEAST = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MASK_POSITIONS = 2500  # above, the oracle goes line by line: an N x N mask would not fit

TIMED_SIZES = ((64, 64), (97, 97), (128, 256))
TIMED_CHANNELS = (64, 512)  # C', C
INPUT_SETS = 6  # together larger than the cache at 97 x 97


@dataclass(frozen=True)
class Case:
    """One drawn call."""

    dtype: str
    batch: int
    sizes: tuple[int, ...]
    key_channels: int
    channels: int
    layout: str
    logit_scale: float
    seed: int


class CheckFailed(Exception):
    """A result is wrong; the message says which."""


def draw_cases(count: int, seed: int) -> list[Case]:
    """Fixed cases for every path of the kernels, then drawn ones, `count` in all for the three dtypes together."""
    draw = random.Random(seed)
    shapes: list[tuple[int, tuple[int, ...], int, int, str, float]] = [
        (1, (1, 1), 1, 1, "contiguous", 1.0),
        (2, (1, 9), 8, 16, "channels_last", 1.0),
        (2, (9, 1), 3, 5, "contiguous", 1.0),
        (1, (97, 97), 64, 512, "channels_last", 1.0),
        (1, (128, 256), 64, 512, "channels_last", 1.0),
        (1, (5, 63, 63), 64, 512, "channels_last", 1.0),
        (2, (129, 3), 24, 72, "channels_last", 1.0),
        (1, (5000,), 16, 40, "contiguous", 1.0),
        (1, (3, 1300), 72, 264, "channels_last", 2.0),
        (1, (20, 30), 64, 2048, "channels_last", 1.0),
        (1, (20, 30), 700, 33, "sliced", 1.0),
        (1, (33, 40), 64, 128, "channels_last", 1e5),
        (70000, (1, 2), 8, 8, "channels_last", 1.0),
    ]
    per_dtype = max(len(shapes), -(-count // len(DTYPES)))
    while len(shapes) < per_dtype:
        axes = draw.randint(1, 3)
        most = {1: 70, 2: 70, 3: 12}[axes]
        sizes = tuple(1 if draw.random() < 0.1 else draw.randint(1, most) for _ in range(axes))
        key_channels = 8 * draw.randint(1, 16) if draw.random() < 0.5 else draw.randint(1, 80)
        channels = 8 * draw.randint(1, 64) if draw.random() < 0.5 else draw.randint(1, 300)
        scale = draw.choice((0.1, 1.0, 1.0, 3.0, 20.0))
        shapes.append((draw.randint(1, 3), sizes, key_channels, channels, draw.choice(LAYOUTS), scale))
    return [Case(dtype, *shape, seed=seed + i) for dtype in DTYPES for i, shape in enumerate(shapes)]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and grad_out of the case, laid out as it says."""
    generator = torch.Generator(device).manual_seed(case.seed)
    scale = (case.logit_scale / case.key_channels**0.5) ** 0.5
    tensors = []
    for channels, factor in ((case.key_channels, scale),) * 2 + ((case.channels, 1.0),) * 2:
        shape = (case.batch, channels, *case.sizes)
        dtype = DTYPES[case.dtype]

        def normal(shape: tuple[int, ...], factor: float = factor, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * factor).to(dtype)

        if case.layout == "expanded":
            tensors.append(normal((1, *shape[1:])).expand(shape))
        elif case.layout == "sliced":  # neither the address nor the strides are multiples of 16 bytes
            wide = normal((case.batch, *case.sizes, channels + 3))
            tensors.append(wide[..., 1 : channels + 1].movedim(-1, 1))
        elif case.layout == "channels_last":
            tensors.append(normal((case.batch, *case.sizes, channels)).movedim(-1, 1))
        else:
            tensors.append(normal(shape))
    query, key, value, grad_out = tensors
    return query, key, value, grad_out


def poison(case: Case, device: torch.device) -> None:
    """Leave NaN in the memory that the allocator hands out next, for tensors of the sizes that the op allocates."""
    positions = case.batch * torch.Size(case.sizes).numel()
    dtype = DTYPES[case.dtype]
    blocks = []
    for channels in (case.key_channels, case.key_channels, case.channels):
        blocks.append(torch.full((positions * channels,), float("nan"), dtype=dtype, device=device))
    for factor in (1, 1, 2, 4):
        blocks.append(torch.full((positions * factor,), float("nan"), device=device))
    del blocks


def run_kernels(case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The CUDA operators, called directly."""
    query, key, value, grad_out = inputs
    poison(case, query.device)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    poison(case, query.device)
    grads = torch.ops.ccnet_d2.criss_cross_backward(grad_out, query, key, value, out, lse)
    if query.is_cuda:
        torch.cuda.synchronize()
    return {"lse": lse, **dict(zip(NAMES, (out, *grads), strict=True))}


def neighbour_mask(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(N, N), true where two positions differ along at most one axis."""
    axes = [torch.arange(size, device=device) for size in sizes]
    places = torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])
    return (places[:, :, None] != places[:, None, :]).sum(0) <= 1


def masked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, with one dense N x N softmax."""
    mask = neighbour_mask(tuple(query.shape[2:]), query.device)
    q, k, v = (x.flatten(2) for x in (query, key, value))
    energy = torch.einsum("bcn,bcm->bnm", q, k).masked_fill(~mask, float("-inf"))
    return torch.einsum("bcm,bnm->bcn", v, energy.softmax(-1)).reshape(value.shape)


def differentiate(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients of a differentiable formulation."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = function(query, key, value)
    grads = torch.autograd.grad(out, (query, key, value), inputs[3])
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def relative_error(got: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """The error's norm over that of `expected`, or over `least` where that is larger."""
    difference = torch.linalg.vector_norm(got.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(least))


def least_norms(case: Case) -> dict[str, float]:
    """Norms below which gradients are what is left after cancellation.

    Where nearly all weight lies on one key, the gradients of query and key are differences of nearly equal numbers,
    each as large as sqrt(C).
    """
    elements = case.batch * torch.Size(case.sizes).numel() * case.key_channels
    logits = (case.logit_scale / case.key_channels**0.5) ** 0.5
    least = 0.03 * logits * (case.channels * elements) ** 0.5
    return {"grad_query": least, "grad_key": least}


def check_case(case: Case, device: torch.device) -> dict[str, float]:
    """Raises CheckFailed, or returns the errors."""
    inputs = make_inputs(case, device)
    got = run_kernels(case, inputs)
    again = run_kernels(case, inputs)
    for name, tensor in got.items():
        if not torch.isfinite(tensor).all():
            raise CheckFailed(f"{name} is not finite")
        if not torch.equal(tensor, again[name]):
            raise CheckFailed(f"{name} differs between two runs")
    positions = torch.Size(case.sizes).numel()
    if case.logit_scale >= 1e4 or case.batch * positions > 50_000:
        return {}  # finite and reproducible is what can be asked: one rounding decides which key is the largest
    oracle = masked_attention if positions <= MASK_POSITIONS else reference.criss_cross_attention
    expected = differentiate(oracle, tuple(x.double() for x in inputs))
    least = least_norms(case)

    def errors_of(results: dict[str, Tensor]) -> dict[str, float]:
        return {name: relative_error(results[name], expected[name], least.get(name, 1e-30)) for name in NAMES}

    errors = errors_of(got)
    plain = errors_of(differentiate(textbook_attention, inputs))
    for name in NAMES:
        floor = TOLERANCE[name] if case.dtype == "float32" else HALF_LEAST[DTYPES[case.dtype]]
        limit = max(FACTOR[name] * plain[name], floor)
        if not errors[name] <= limit:
            raise CheckFailed(f"{name} has a relative error of {errors[name]:.2e}, {limit:.2e} is allowed")
    return errors


def check_large(device: torch.device) -> float:
    """More than 2**31 elements in value and out; a sample of positions against float64. Needs some 30 GB."""
    height, width, key_channels, channels = 2100, 2100, 8, 512
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, height, width)
    query, key = (
        torch.randn((*shape, key_channels), generator=generator, device=device, dtype=dtype).movedim(-1, 1)
        for _ in range(2)
    )
    value = torch.randn((*shape, channels), generator=generator, device=device, dtype=dtype).movedim(-1, 1)
    out, _ = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    draw = random.Random(0)
    worst = 0.0
    for _ in range(64):
        i, j = draw.randrange(height), draw.randrange(width)
        rows = torch.tensor([r for r in range(height) if r != i], device=device)
        keys, values = (
            torch.cat([x[0, :, rows, j], x[0, :, i, :]], dim=1).double() for x in (key, value)
        )  # (C, H + W - 1)
        weights = (query[0, :, i, j].double() @ keys).softmax(-1)
        worst = max(worst, relative_error(out[0, :, i, j], values @ weights))
    if not worst <= HALF_LEAST[dtype]:
        raise CheckFailed(f"out has a relative error of {worst:.2e} beyond 2**31 elements")
    return worst


def graph_milliseconds(call: Callable[[int], object], repeats: int) -> float:
    """Median time of call(i) over the input sets, as replays of one CUDA graph: no launch gaps."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(INPUT_SETS):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(INPUT_SETS)]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / INPUT_SETS)
    del kept
    return statistics.median(times)


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Copied bytes per second (read plus written) and floating-point operations per second of large matrix products."""

    def median_seconds(call: Callable[[], object]) -> float:
        times = []
        for i in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    source = torch.randint(-128, 127, (1 << 31,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ceilings = {"bytes": 2 * source.numel() / median_seconds(lambda: target.copy_(source))}
    for name, dtype in DTYPES.items():
        n = 8192
        a, b = (torch.randn((n, n), device=device, dtype=dtype) for _ in range(2))
        ceilings[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b)
    return ceilings


def time_sizes(
    dtype: str, sizes: tuple[int, ...], ceilings: dict[str, float], device: torch.device, repeats: int
):
    """One row for each pass and formulation."""
    key_channels, channels = TIMED_CHANNELS
    # Each formulation gets the layout that it is made for.
    sets = {
        layout: [
            make_inputs(Case(dtype, 1, sizes, key_channels, channels, layout, 1.0, seed=i), device)
            for i in range(INPUT_SETS)
        ]
        for layout in ("channels_last", "contiguous")
    }
    formulations: dict[str, Callable[..., Tensor]] = {
        "compiled": compiled.criss_cross_attention,
        "matmul": matmul.criss_cross_attention,
        "textbook": textbook_attention,
    }
    flops = operator_flops(1, key_channels, channels, sizes)
    elements = operator_elements(1, key_channels, channels, sizes)
    itemsize = torch.empty((), dtype=DTYPES[dtype]).element_size()
    rows = []
    for step, pass_name in enumerate(("forward", "forward+backward")):
        flop_count, element_count = sum(flops[: step + 1]), sum(elements[: step + 1])
        floor = 1e3 * max(flop_count / ceilings[dtype], element_count * itemsize / ceilings["bytes"])
        for name, function in formulations.items():
            layout = "contiguous" if name == "textbook" else "channels_last"

            def call(
                i: int, function: Callable[..., Tensor] = function, step: int = step, layout: str = layout
            ) -> object:
                query, key, value, grad_out = sets[layout][i]
                if step == 0:
                    with torch.no_grad():
                        return function(query, key, value)
                leaves = tuple(x.detach().requires_grad_() for x in (query, key, value))
                return torch.autograd.grad(function(*leaves), leaves, grad_out)

            milliseconds = graph_milliseconds(call, repeats)
            rows.append(
                {
                    "dtype": dtype,
                    "sizes": "x".join(map(str, sizes)),
                    "pass": pass_name,
                    "formulation": name,
                    "milliseconds": milliseconds,
                    "floor_milliseconds": floor,
                    "times_floor": milliseconds / floor,
                }
            )
        textbook = rows[-1]["milliseconds"]
        for row in rows[-len(formulations) :]:
            row["times_faster_than_textbook"] = textbook / row["milliseconds"]
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu checks the CPU kernels by the same list",
    )
    parser.add_argument(
        "--cases", type=int, default=500, help="how many cases to check, over the three dtypes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--large", action="store_true", help="also check a call beyond 2**31 elements (30 GB)"
    )
    parser.add_argument("--no-timing", action="store_true", help="check only")
    parser.add_argument("--repeats", type=int, default=50, help="timed replays, of which the median counts")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("This machine has no GPU that torch can use.", file=sys.stderr)
        return 2
    reason = compiled.unavailable_reason(arguments.device)
    if reason is not None:
        print(f"The kernels are not here: {reason}", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    # The comparisons in float32 are meant to be exact float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{device_name}, torch {torch.__version__}")

    failures, worst = [], {dtype: dict.fromkeys(NAMES, 0.0) for dtype in DTYPES}
    cases = draw_cases(arguments.cases, arguments.seed)
    for case in cases:
        try:
            for name, error in check_case(case, device).items():
                worst[case.dtype][name] = max(worst[case.dtype][name], error)
        except CheckFailed as failure:
            failures.append({"case": asdict(case), "failure": str(failure)})
            print(f"FAILED {case}: {failure}")
    print(f"{len(cases)} cases, {len(failures)} failed")
    for dtype, errors in worst.items():
        print(f"  {dtype:9} largest relative errors: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    if arguments.large:
        try:
            print(f"beyond 2**31 elements: largest relative error {check_large(device):.1e}")
        except CheckFailed as failure:
            failures.append({"case": "large", "failure": str(failure)})
            print(f"FAILED large: {failure}")

    rows: list[dict[str, object]] = []
    ceilings: dict[str, float] = {}
    if device.type == "cuda" and not arguments.no_timing and not failures:
        ceilings = measure_ceilings(device)
        print("measured: " + ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in ceilings.items()))
        print(
            f"{'dtype':9} {'sizes':8} {'pass':17} {'formulation':12} {'ms':>9} {'x floor':>8} {'x textbook':>11}"
        )
        for dtype in DTYPES:
            for sizes in TIMED_SIZES:
                for row in time_sizes(dtype, sizes, ceilings, device, arguments.repeats):
                    rows.append(row)
                    print(
                        f"{row['dtype']:9} {row['sizes']:8} {row['pass']:17} {row['formulation']:12} "
                        f"{row['milliseconds']:9.4f} {row['times_floor']:8.2f} "
                        f"{row['times_faster_than_textbook']:11.2f}"
                    )
    if arguments.json is not None:
        report = {
            "device": device_name,
            "torch": torch.__version__,
            "cases": len(cases),
            "failures": failures,
            "largest_errors": worst,
            "ceilings": ceilings,
            "times": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
