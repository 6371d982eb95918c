#!/usr/bin/env python
"""Check and time the CUDA kernels of criss-cross attention on the GPU of this machine.

    python projects/CCNet/tools/check_cuda_op.py                       # 500 cases, then times
    python projects/CCNet/tools/check_cuda_op.py --large --json op.json
    python projects/CCNet/tools/check_cuda_op.py --cases 0 --dtype bfloat16 --official official.so  # times alone
    compute-sanitizer --tool memcheck python projects/CCNet/tools/check_cuda_op.py --small  # or another tool

Builds nothing: the CUDA library must be there (`python -m ccnet_d2.collect_env` says whether it is).

Checked, for drawn shapes, strides and dtypes: outputs and gradients against a float64 oracle built from an explicit
neighbour mask, and against the error of the textbook form in the same precision; bitwise equality between
runs; memory that the kernels should write filled with NaN before. Timed, as replays of CUDA graphs over several sets of
inputs: the kernels, the matmul backend and the textbook form, beside the floor that follows from the bandwidth and
the matrix rate measured in the same run.

--small is for compute-sanitizer, which slows kernels down a hundredfold: each kernel by the smallest calls that reach
all of it, and next to none of other libraries, since inputs are drawn and results checked on the CPU. Every tensor has
an allocation of its own there, so that an access beyond its end, or to what nothing wrote, is seen.

--official compares with the kernels of the authors' repository: official_kernels.py says how to build them.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes, N number of positions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attention_formulations import textbook_attention
from ccnet_d2.ops import compiled, reference
from ccnet_d2.script_exit import exit_with
from cuda_op_cases import DTYPES, Case, draw_cases, make_inputs, small_cases
from cuda_op_times import TABLE_HEAD, TIMED_SIZES, measure_ceilings, render_row, time_sizes
from official_kernels import OfficialKernels

NAMES = ("out", "grad_query", "grad_key", "grad_value")
# Relative errors in the Frobenius norm that are allowed: times the textbook form's error in the same precision, and in
# fp32 at least this much.
FACTOR = {"out": 2.0, "grad_query": 3.0, "grad_key": 3.0, "grad_value": 3.0}
TOLERANCE = {"out": 1e-5, "grad_query": 3e-5, "grad_key": 3e-5, "grad_value": 3e-5}
# Where the textbook form happens to be exact, a few roundings are still allowed.
HALF_LEAST = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MASK_POSITIONS = 2500  # above, the oracle goes line by line: an N x N mask would not fit
CPU = torch.device("cpu")


class CheckFailed(Exception):
    """A result is wrong; the message says which."""


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


def run_kernels(case: Case, inputs: tuple[Tensor, ...], *, poisoned: bool = True) -> dict[str, Tensor]:
    """The operators, called directly. `poisoned`: into memory that holds NaN."""
    query, key, value, grad_out = inputs
    if poisoned:
        poison(case, query.device)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    if poisoned:
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
        if not torch.equal(tensor, again[name]):
            raise CheckFailed(f"{name} differs between two runs")
    return judge(case, inputs, got)


def check_small_case(case: Case, device: torch.device) -> dict[str, float]:
    """The same with one run of the kernels, and everything else on the CPU."""
    got = run_kernels(case, make_inputs(case, device, drawn_on=CPU), poisoned=False)
    return judge(case, make_inputs(case, CPU), {name: tensor.cpu() for name, tensor in got.items()})


def judge(case: Case, inputs: tuple[Tensor, ...], got: dict[str, Tensor]) -> dict[str, float]:
    """Raises CheckFailed where results are wrong, or returns their errors."""
    for name, tensor in got.items():
        if not torch.isfinite(tensor).all():
            raise CheckFailed(f"{name} is not finite")
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


def check_official(official: OfficialKernels, device: torch.device) -> dict[str, float]:
    """The official kernels' results by ours, in fp32; raises CheckFailed where they differ."""
    worst = dict.fromkeys(NAMES, 0.0)
    for seed, (batch, sizes) in enumerate([(2, (9, 13)), (1, (33, 40)), (1, (97, 97))]):
        case = Case("float32", batch, sizes, 64, 128, "contiguous", 1.0, seed)
        inputs = make_inputs(case, device)
        ours = differentiate(compiled.criss_cross_attention, inputs)
        theirs = differentiate(official.attention, inputs)
        for name in NAMES:
            error = relative_error(ours[name], theirs[name].double())
            worst[name] = max(worst[name], error)
            if not error <= 2 * TOLERANCE[name]:
                raise CheckFailed(f"{name} differs from the official kernels' by {error:.2e}, {sizes}")
    return worst


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
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--cases", type=int, default=500, help="how many cases to check, over the dtypes; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--small", action="store_true", help="check the small cases instead, for compute-sanitizer; no times"
    )
    parser.add_argument(
        "--large", action="store_true", help="also check a call beyond 2**31 elements (30 GB)"
    )
    parser.add_argument(
        "--official",
        type=Path,
        metavar="FILE",
        help="library of the official kernels: compare results and times",
    )
    parser.add_argument("--no-timing", action="store_true", help="check only")
    parser.add_argument(
        "--repeats", type=int, default=50, help="most timed replays, of which the median counts"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    arguments = parser.parse_args(argv)
    if arguments.official is not None and arguments.device == "cpu":
        parser.error("--official needs --device cuda: the official kernels run on a GPU only.")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("This machine has no GPU that torch can use.", file=sys.stderr)
        return 2
    reason = compiled.unavailable_reason(arguments.device)
    if reason is not None:
        print(f"The kernels are not here: {reason}", file=sys.stderr)
        return 2
    official = None
    if arguments.official is not None:
        try:
            official = OfficialKernels(arguments.official)
        except OSError as error:
            print(f"--official: {error}", file=sys.stderr)
            return 2
    if arguments.json is not None:  # before minutes are spent on what would then be lost
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.small:
        # An allocation for each tensor. Read by torch at the first one.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    device = torch.device(arguments.device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    # The comparisons in float32 are meant to be exact float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{device_name}, torch {torch.__version__}", flush=True)

    dtypes = tuple(arguments.dtype)
    failures, worst = [], {dtype: dict.fromkeys(NAMES, 0.0) for dtype in dtypes}
    if arguments.small:
        cases, check = small_cases(arguments.seed, dtypes), check_small_case
    else:
        cases, check = draw_cases(arguments.cases, arguments.seed, dtypes), check_case
    for number, case in enumerate(cases, 1):
        try:
            for name, error in check(case, device).items():
                worst[case.dtype][name] = max(worst[case.dtype][name], error)
        except CheckFailed as failure:
            failures.append({"case": asdict(case), "failure": str(failure)})
            print(f"FAILED {case}: {failure}", flush=True)
        if arguments.small:  # what is slow says how far it has come
            print(f"{number} of {len(cases)}: {case}", flush=True)
    if cases:
        print(f"{len(cases)} cases, {len(failures)} failed")
        for dtype, errors in worst.items():
            print(
                f"  {dtype:9} largest relative errors: "
                + ", ".join(f"{n} {e:.1e}" for n, e in errors.items())
            )
    if arguments.large:
        try:
            print(f"beyond 2**31 elements: largest relative error {check_large(device):.1e}")
        except CheckFailed as failure:
            failures.append({"case": "large", "failure": str(failure)})
            print(f"FAILED large: {failure}")
    if official is not None:
        try:
            differences = check_official(official, device)
            print(
                "the official kernels differ by " + ", ".join(f"{n} {e:.1e}" for n, e in differences.items())
            )
        except CheckFailed as failure:
            failures.append({"case": "official", "failure": str(failure)})
            print(f"FAILED official: {failure}")

    rows: list[dict[str, object]] = []
    ceilings: dict[str, float] = {}
    if device.type == "cuda" and not (arguments.no_timing or arguments.small or failures):
        ceilings = measure_ceilings(device, dtypes)
        print("measured: " + ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in ceilings.items()))
        print(TABLE_HEAD, flush=True)
        for dtype in dtypes:
            for sizes in TIMED_SIZES:
                for row in time_sizes(dtype, sizes, ceilings, device, arguments.repeats, official):
                    rows.append(row)
                    print(render_row(row), flush=True)
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
    exit_with(main)
