#!/usr/bin/env python
"""Check and time the CUDA kernels of criss-cross attention on the GPU of this machine.

    python projects/CCNet/tools/check_cuda_op.py                       # 500 cases, then times
    python projects/CCNet/tools/check_cuda_op.py --large --json op.json
    python projects/CCNet/tools/check_cuda_op.py --cases 0 --dtype bfloat16 --official official.so  # times alone
    compute-sanitizer --tool memcheck python projects/CCNet/tools/check_cuda_op.py --small  # or another tool

Builds nothing: the CUDA library must be there (`python -m ccnet_d2.collect_env` says whether it is).

Checked, for drawn shapes, strides and dtypes: outputs and gradients against a float64 oracle built from an explicit
neighbour mask, and against the error of the textbook form in the same precision; bitwise equality between
runs; memory that the kernels should write filled with NaN before; and the other steps of a layer. Timed, as replays of
CUDA graphs over several sets of inputs: the kernels, the matmul backend and the textbook form, beside the floor that
follows from the bandwidth and the matrix rate measured in the same run; and a layer's other steps.

--small is for compute-sanitizer, which slows kernels down a hundredfold: each kernel by the smallest calls that reach
all of it, and next to none of other libraries, since inputs are drawn and results checked on the CPU. Every tensor has
an allocation of its own there, so that an access beyond its end, or to what nothing wrote, is seen.

--official compares with the kernels of the authors' repository: official_kernels.py says how to build them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ccnet_d2.ops import compiled
from ccnet_d2.script_exit import exit_with
from cuda_layer_checks import check_layer_steps
from cuda_layer_times import STEP_HEAD, render_step, time_layer_steps
from cuda_op_cases import DTYPES, Case, draw_cases, small_cases
from cuda_op_checks import NAMES, CheckFailed, check_case, check_large, check_official, check_small_case
from cuda_op_times import TABLE_HEAD, TIMED_SIZES, measure_ceilings, render_row, time_sizes
from official_kernels import OfficialKernels
from op_arguments import parse_count, parse_output

Failures = list[dict[str, object]]
"""What failed, "case", and how, "failure"."""


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
        "--repeats", type=parse_count, default=50, help="most timed replays, of which the median counts"
    )
    parser.add_argument("--json", type=parse_output, metavar="FILE", help="write everything to this file too")
    arguments = parser.parse_args(argv)
    if arguments.cases < 0:
        parser.error(f"--cases must be 0 or more, got {arguments.cases}.")
    if arguments.official is not None and arguments.device == "cpu":
        parser.error("--official needs --device cuda: the official kernels run on a GPU only.")
    return arguments


def check_cases(
    cases: Sequence[Case],
    check: Callable[[Case, torch.device], dict[str, float]],
    device: torch.device,
    *,
    progress: bool,
) -> tuple[Failures, dict[str, dict[str, float]]]:
    """Print and return what failed, and the largest errors of each dtype.

    Args:
        cases: the calls.
        check: one of `cuda_op_checks`.
        device: where they are made.
        progress: whether to print a line for each call.
    """
    failures: Failures = []
    worst = {case.dtype: dict.fromkeys(NAMES, 0.0) for case in cases}
    for number, case in enumerate(cases, 1):
        try:
            for name, error in check(case, device).items():
                worst[case.dtype][name] = max(worst[case.dtype][name], error)
            check_layer_steps(case, device)
        except CheckFailed as failure:
            failures.append({"case": asdict(case), "failure": str(failure)})
            print(f"FAILED {case}: {failure}", flush=True)
        if progress:
            print(f"{number} of {len(cases)}: {case}", flush=True)
    if cases:
        print(f"{len(cases)} cases, {len(failures)} failed")
    for dtype, errors in worst.items():
        print(f"  {dtype:9} largest relative errors: {_errors_text(errors)}")
    return failures, worst


def check_once(name: str, check: Callable[[], str]) -> Failures:
    """Print the sentence that a check gives, or its failure, which is returned."""
    try:
        print(check())
    except CheckFailed as failure:
        print(f"FAILED {name}: {failure}")
        return [{"case": name, "failure": str(failure)}]
    return []


def time_all(
    dtypes: tuple[str, ...], device: torch.device, repeats: int, official: OfficialKernels | None
) -> tuple[dict[str, float], list[dict[str, object]], list[dict[str, object]]]:
    """Print and return the measured ceilings, and rows: one for each dtype, size, pass and formulation, and one
    for each of a layer's other steps.
    """
    ceilings = measure_ceilings(device, dtypes)
    print("measured: " + ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in ceilings.items()))
    print(TABLE_HEAD, flush=True)
    rows = []
    for dtype in dtypes:
        for sizes in TIMED_SIZES:
            for row in time_sizes(dtype, sizes, ceilings, device, repeats, official):
                rows.append(row)
                print(render_row(row), flush=True)
    print(STEP_HEAD, flush=True)
    steps = []
    for dtype in dtypes:
        for sizes in TIMED_SIZES:
            for row in time_layer_steps(dtype, sizes, ceilings, device, repeats):
                steps.append(row)
                print(render_step(row), flush=True)
    return ceilings, rows, steps


def _errors_text(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _why_not(device: str) -> str | None:
    """Why the kernels cannot be checked on the device, as one sentence; None where they can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "This machine has no GPU that torch can use."
    reason = compiled.unavailable_reason(device)
    return None if reason is None else f"The kernels are not here: {reason}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 where a check failed, 2 where nothing can be checked."""
    arguments = parse_arguments(argv)
    reason = _why_not(arguments.device)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    official = None
    if arguments.official is not None:
        try:
            official = OfficialKernels(arguments.official)
        except OSError as error:
            print(f"--official: {error}", file=sys.stderr)
            return 2
    if arguments.small:
        # An allocation for each tensor. Read by torch at the first one.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    device = torch.device(arguments.device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    # The comparisons in float32 are meant to be exact float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{device_name}, torch {torch.__version__}", flush=True)

    dtypes = tuple(arguments.dtype)
    if arguments.small:
        cases, check = small_cases(arguments.seed, dtypes), check_small_case
    else:
        cases, check = draw_cases(arguments.cases, arguments.seed, dtypes), check_case
    # What is slow says how far it has come.
    failures, worst = check_cases(cases, check, device, progress=arguments.small)
    if arguments.large:
        failures += check_once(
            "large", lambda: f"beyond 2**31 elements: largest relative error {check_large(device):.1e}"
        )
    if official is not None:
        failures += check_once(
            "official",
            lambda: f"the official kernels differ by {_errors_text(check_official(official, device))}",
        )
    ceilings: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    steps: list[dict[str, object]] = []
    if device.type == "cuda" and not (arguments.no_timing or arguments.small or failures):
        ceilings, rows, steps = time_all(dtypes, device, arguments.repeats, official)
    if arguments.json is not None:
        report = {
            "device": device_name,
            "torch": torch.__version__,
            "cases": len(cases),
            "failures": failures,
            "largest_errors": worst,
            "ceilings": ceilings,
            "times": rows,
            "layer_times": steps,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    exit_with(main)
