"""The CUDA kernels without a GPU: run on the emulated machine, and compiled for each architecture.

The emulation (csrc/cuda/emulation) compiles the kernel sources with the host compiler, runs every thread of a CTA,
checks memory accesses and barriers, and compares with float64 brute force. On a GPU the same is done by
projects/CCNet/tools/check_cuda_op.py.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
DTYPES = ("float", "half", "bfloat16")
KERNELS = ("forward_kernel", "backward_kernel", "delta_kernel", "residual_sum_kernel")
# A copy, the forward and the backward pass, by elements; of 16 bits, by pairs as well.
RESIDUAL_KERNELS = {"float": 3, "half": 6, "bfloat16": 6}
# Three of each: lines of one block, of two, and of one with fewer rows; and one more that finds delta as well.
HOPPER_KERNELS = (
    *("hopper_forward_kernel", "hopper_backward_kernel") * 3,
    *("hopper_backward_kernel", "dense_delta_kernel"),
)

pytestmark = pytest.mark.skipif(not CUDA_SOURCES.is_dir(), reason="the CUDA sources are not here")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_for_emulation("main.cpp", tmp_path_factory.mktemp("emulation"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_brute_force(emulator: Path, dtype: str) -> None:
    output = _run([str(emulator), "--dtype", dtype, "--capability", "80", "--cases", "17"])
    assert re.match(rf"{dtype}: 17 cases; largest errors: out ", output)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_kernels_for_capability_90_agree_with_brute_force(emulator: Path, dtype: str) -> None:
    output = _run([str(emulator), "--dtype", dtype, "--capability", "90", "--cases", "12"])
    assert re.match(rf"{dtype}: 12 cases; largest errors: out ", output)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_brute_force_on_many_shapes(emulator: Path, dtype: str) -> None:
    assert f"{dtype}: 100 cases" in _run([str(emulator), "--dtype", dtype, "--cases", "100", "--seed", "7"])


@pytest.mark.parametrize(
    ("fault", "dtype", "capability", "symptom"),
    [
        ("skip-barrier", "float", 80, "without a barrier"),
        ("skip-barrier", "bfloat16", 80, "without a barrier"),
        ("copy-late", "half", 80, "while a copy into it is under way"),
        ("swap-fragments", "bfloat16", 80, "errors: "),
        ("transpose-mma", "half", 80, "errors: "),
        ("swap-fragments", "float", 80, "errors: "),
        ("transpose-mma", "float", 80, "errors: "),
        ("shuffle", "float", 80, "errors: "),
        ("drop-tail", "bfloat16", 80, "errors: "),
        ("swap-fragments", "half", 90, "errors: "),
        ("skip-phase", "half", 90, "more arrivals in a phase than it takes"),
        ("wrong-parity", "bfloat16", 90, "more arrivals in a phase than it takes"),
        ("refill-early", "half", 90, "a box is loaded while another into the same place is under way"),
        ("lose-arrival", "bfloat16", 90, "deadlock"),
        ("skip-fence", "half", 90, "ordinary writes without a fence between"),
        ("plain-box", "bfloat16", 90, "errors: "),
        ("keep-outside", "half", 90, "is not finite"),
        ("transpose-descriptor", "bfloat16", 90, "matrix descriptor"),
        ("wait-too-little", "half", 90, "product"),
        ("skip-store-wait", "half", 90, "may still be read from shared memory"),
        ("skip-launch-wait", "bfloat16", 90, "while an earlier launch that writes it may be under way"),
    ],
)
def test_emulation_notices_faults(
    emulator: Path, fault: str, dtype: str, capability: int, symptom: str
) -> None:
    command = [str(emulator), "--dtype", dtype, "--capability", str(capability), "--fault", fault]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 1, result.stdout + result.stderr
    assert symptom in result.stdout


def test_emulated_machine_itself(tmp_path: Path) -> None:
    program = _build_for_emulation("hopper_check.cpp", tmp_path)
    assert re.match(r"\d{3} checks passed", _run([str(program)]))


def test_residual_kernels_agree_with_float64(tmp_path: Path) -> None:
    program = str(_build_for_emulation("residual_check.cpp", tmp_path))
    # None more than one rounding, no bit different with another order of threads, both ways of moving channels taken.
    for line, dtype in zip(_run([program]).splitlines(), DTYPES, strict=True):
        match = re.fullmatch(rf"{dtype}: 40 cases, .*; (\d+) launches by element, (\d+) by pair", line)
        assert match is not None, line
        assert int(match[1]) > 0 and (int(match[2]) > 0) == (dtype != "float")
    for fault, symptom in (("skip-barrier", "without a barrier"), ("shuffle", "the sum is wrong")):
        result = subprocess.run([program, "--fault", fault], capture_output=True, text=True, timeout=900)
        assert result.returncode == 1 and symptom in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile_without_spills(dtype: str, architecture: str, tmp_path: Path) -> None:
    kernels = (*KERNELS, *["residual_kernel"] * RESIDUAL_KERNELS[dtype])
    _compile_without_spills(f"kernels_{dtype}.cu", architecture, kernels, tmp_path)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_kernels_for_capability_90_compile_without_spills(dtype: str, tmp_path: Path) -> None:
    report = _compile_without_spills(f"hopper_{dtype}.cu", "90a", HOPPER_KERNELS, tmp_path)
    # ptxas says so where it makes asynchronous products wait for each other.
    assert "serialized" not in report, report


def _compile_without_spills(source: str, architecture: str, kernels: tuple[str, ...], folder: Path) -> str:
    command = [
        *(str(_nvcc()), "-std=c++17", "-O3", "-Xptxas", "-v"),
        *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
        *("-c", str(CUDA_SOURCES / source), "-o", str(folder / "kernels.o")),
    ]
    report = _run(command)
    assert "warning" not in report, report
    entries = re.split(r"Compiling entry function '", report)[1:]
    names = [entry.split("'")[0] for entry in entries]
    assert [sum(kernel in name for name in names) for kernel in kernels] == [
        kernels.count(kernel) for kernel in kernels
    ], names
    for entry in entries:
        figures = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        assert figures is not None, entry
        assert figures.groups() == ("0", "0", "0"), entry
    return report


@pytest.mark.parametrize("name", ["bind_cuda.cpp", "bind_residual.cpp"])
def test_binding_compiles(name: str) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    headers = _nvcc().resolve().parents[1] / "include"
    if compiler is None or not (headers / "cuda_runtime_api.h").is_file():
        pytest.skip("no C++ compiler or no CUDA headers")
    from torch.utils.cpp_extension import include_paths

    includes = [option for path in [*include_paths(), str(headers)] for option in ("-isystem", path)]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source = str(CUDA_SOURCES / name)
    _run([compiler, "-std=c++17", "-fsyntax-only", *warnings, *defines, *includes, source])


def _build_for_emulation(source: str, folder: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "emulate"
    # Fibers change stacks with longjmp, which fortified builds refuse.
    options = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-DCCNET_EMULATION"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    path = CUDA_SOURCES / "emulation" / source
    _run([compiler, *options, *warnings, str(path), "-o", str(program)])
    return program


def _nvcc() -> Path:
    """The compiler inside its toolkit: what is on PATH may be a script that forwards to it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    pytest.skip("no CUDA toolkit: set CUDA_HOME to one to compile the kernels")


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
