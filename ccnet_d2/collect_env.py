"""What a bug report should say: versions, the machine, and the backends of criss-cross attention."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import torch

import ccnet_d2
from ccnet_d2.ops import available_backends, compiled
from ccnet_d2.ops.backends import automatic_backend_on
from ccnet_d2.script_exit import exit_with

_DISTRIBUTIONS = ("torchvision", "detectron2", "fvcore", "omegaconf", "numpy", "Pillow")
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VARIABLES = (
    "CCNET_CPU_ISA",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "FORCE_CUDA",
    "CUDA_HOME",
    "CCNET_EXT",
)


def collect_env_info() -> str:
    """Versions, devices and which backend of criss-cross attention is active, with a reason for each that is not."""
    rows = [
        ("ccnet_d2", f"{ccnet_d2.__version__} ({os.path.dirname(os.path.abspath(ccnet_d2.__file__))})"),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in _DISTRIBUTIONS),
        ("CPU threads", str(torch.get_num_threads())),
        ("CUDA of torch", str(torch.version.cuda)),
        *_gpus(),
        *((name, os.environ[name]) for name in _VARIABLES if name in os.environ),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", "criss-cross attention:", *(f"  {line}" for line in _backends())])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none that torch sees")]
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            (f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
        )
    return found


def _backends() -> list[str]:
    lines = [f'backend="auto" on cpu: {automatic_backend_on("cpu", torch.float32)}']
    if torch.cuda.is_available():
        half, single = (automatic_backend_on("cuda", dtype) for dtype in (torch.bfloat16, torch.float32))
        lines.append(f'backend="auto" on cuda: {half} in half precision, {single} in float32')
    for name, reason in available_backends().items():
        if name != "compiled":
            lines.append(f"{name}: available" if reason is None else f"{name}: not available: {reason}")
    for device in ("cpu", "cuda"):
        reason = compiled.unavailable_reason(device)
        if reason is not None:
            lines.append(f"compiled on {device}: not available: {reason}")
        elif device == "cpu":
            lines.append(f"compiled on cpu: {_instruction_sets()}")
        else:
            lines.append("compiled on cuda: available")
    return lines


def _instruction_sets() -> str:
    try:
        sets = [f"{str(d).removeprefix('torch.')} {compiled.instruction_set(d)}" for d in _CPU_DTYPES]
    except RuntimeError as error:  # the library does not know the value of CCNET_CPU_ISA
        return f"fails: {error}"
    return f"available; instruction sets: {', '.join(sets)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    argparse.ArgumentParser(prog="python -m ccnet_d2.collect_env", description=__doc__).parse_args(argv)
    print(collect_env_info())
    return 0


if __name__ == "__main__":
    exit_with(main)
