"""The command line of benchmark_op.py."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch

from ccnet_d2.ops import BACKENDS, available_backends
from ccnet_d2.ops.compiled import unavailable_reason
from op_candidates import DTYPES

SECTIONS = ("core", "module", "memory", "threads", "growth")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


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


def parse_output(text: str) -> Path:
    """A file that can be written; its folder is made, before minutes are spent on what would then be lost."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: {path.parent} cannot be made ({error.strerror})."
        ) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file.")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: {path.parent} is read-only for this user."
        )
    return path


def parse_arguments(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """What is to be measured; ends the program where it cannot be.

    Args:
        argv: the arguments; None for the program's own.
        description: a line for --help.
    """
    parser = _parser(description)
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


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
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
    parser.add_argument("--json", type=parse_output, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot",
        type=parse_output,
        metavar="FILE",
        help=f"write a picture there ({', '.join(PLOT_SUFFIXES)})",
    )
    return parser


def backends_on(device: str) -> dict[str, str | None]:
    """For each backend why it does not run on the device, as one sentence; None where it does."""
    return available_backends() | {"compiled": unavailable_reason(device)}
