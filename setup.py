"""Builds the compiled operator (csrc/) on top of what pyproject.toml says.

There are two libraries beside ccnet_d2/ops: `_C_cpu.so`, built wherever torch can be imported and a C++ compiler is
found, and `_C_cuda.so`, built where there are a CUDA toolkit and a GPU as well. They speak to torch through the
LibTorch stable ABI and not to Python at all, so that one build serves every Python, and torch from 2.10 on. What
cannot be built is left out, with a word of why: the package then computes with PyTorch's own operators.

Environment variables:
    CCNET_EXT: "0" builds nothing, "require" makes it an error when the CPU library (or, under FORCE_CUDA=1, the CUDA
        library) is not built.
    FORCE_CUDA: "1" builds the CUDA library without a GPU, "0" does not build it at all.
    CUDA_HOME: the CUDA toolkit, for example /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST: the architectures to compile for, "8.0;9.0+PTX" if unset; those older than 8.0 are left out.
    CXX, CXXFLAGS: the C++ compiler (c++, g++ or clang++ if unset) and more flags for it. nvcc takes the compiler of
        CXX, too, unless NVCC_CCBIN names another.
    MAX_JOBS: how many files to compile at once, one for each processor if unset.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
# The torch whose stable ABI the libraries are held to: 2.10.0 in torch's own encoding.
TORCH_TARGET_VERSION = "0x020a000000000000"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"
OLDEST_CUDA_ARCHITECTURE = 8  # the first number: of asynchronous copies and bf16 products
# What may stand before the compiler in CXX.
COMPILER_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


# Kernels whose instructions only one architecture has, by the beginning of their files' names: what
# TORCH_CUDA_ARCH_LIST calls it, and what nvcc does.
ARCHITECTURE_KERNELS = {"hopper_": ("9.0", "90a")}
# Kernels for instructions that not every compiler knows; the operator works without them.
KERNELS_FOR_NEW_COMPILERS = ("kernel_amx.cpp", "kernel_amx_split.cpp", "kernel_avx512bf16.cpp")


# Beside where the library would be: why it is not there. pip keeps a build's output to itself, and the package reads
# this when it is asked (ccnet_d2/ops/_library.py).
REASON_SUFFIX = ".not_built"


class NotBuilt(Exception):
    """A library cannot be built here; the message says why."""


def announce(text: str) -> None:
    """Say something that is not to be overlooked in a build's output."""
    rule = "*" * 100
    print(f"{rule}\n{text}\n{rule}", file=sys.stderr, flush=True)


def wish() -> str:
    """The value of CCNET_EXT."""
    value = os.environ.get("CCNET_EXT", "")
    if value not in ("", "0", "1", "require"):
        raise SetupError(
            f"CCNET_EXT={value} is unknown: set 0 (build nothing), 1 or require, or leave it unset."
        )
    return value


def import_torch():
    """torch, in a version that has the stable ABI."""
    if importlib.util.find_spec("torch") is None:
        raise NotBuilt(
            "torch cannot be imported by the Python that builds the package; pip's build isolation hides an installed "
            "one: install torch first and use `pip install --no-build-isolation .`"
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        raise NotBuilt(f"importing torch failed: {error}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise NotBuilt(
            f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and torch {torch.__version__} is installed."
        )
    return torch


def find_compiler() -> list[str]:
    """The C++ compiler as a command."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise NotBuilt(f"the C++ compiler that CXX names, {chosen}, does not exist.")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt(
        "no C++ compiler was found (c++, g++ or clang++): install one, for example with `apt install g++`, and then "
        "this package again."
    )


def find_cuda_toolkit() -> Path:
    """The CUDA toolkit's directory, the one with bin/nvcc and include/cuda_runtime.h."""
    named = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), "")
    chosen = os.environ.get(named)
    candidates = [Path(chosen)] if chosen else [Path("/usr/local/cuda"), Path("/opt/cuda")]
    nvcc = shutil.which("nvcc")
    if nvcc and not chosen:
        candidates.insert(0, Path(nvcc).resolve().parents[1])
    for candidate in candidates:
        # An nvcc on PATH may be a script that calls the real one: the headers tell a toolkit.
        if (candidate / "bin" / "nvcc").exists() and (candidate / "include" / "cuda_runtime.h").exists():
            return candidate
    if chosen:
        raise NotBuilt(f"{named}={chosen} has no bin/nvcc or no include/cuda_runtime.h.")
    raise NotBuilt(
        "no CUDA toolkit (nvcc) was found: set CUDA_HOME to its directory, and install this package again."
    )


def job_count() -> int:
    """How many files to compile at once."""
    wanted = os.environ.get("MAX_JOBS") or "0"
    if not wanted.isdecimal():
        raise NotBuilt(f"MAX_JOBS={wanted} is no number of files to compile at once: write for example 4.")
    # sched_getaffinity, where it exists, knows of a container's share of the machine.
    share = getattr(os, "sched_getaffinity", None)
    return int(wanted) or (len(share(0)) if share else os.cpu_count() or 1)


def architecture_list(architectures: str) -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST, "8.0;9.0+PTX" for example, that the kernels can be compiled for.

    Images with PyTorch set it to all that PyTorch knows, older ones among them.
    """
    found, too_old = [], []
    for item in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.\d+[af]?(\+PTX)?", item)
        if match is None:
            raise NotBuilt(
                f"TORCH_CUDA_ARCH_LIST holds {item!r}, which is no architecture: write for example 8.0;9.0+PTX."
            )
        (found if int(match[1]) >= OLDEST_CUDA_ARCHITECTURE else too_old).append(item)
    if not found:
        raise NotBuilt(
            f"TORCH_CUDA_ARCH_LIST={architectures} holds nothing but architectures older than "
            f"{OLDEST_CUDA_ARCHITECTURE}.0, the first that the kernels run on."
        )
    if too_old:
        announce(
            f"ccnet_d2: of TORCH_CUDA_ARCH_LIST, {', '.join(too_old)} are left out: the kernels run on architecture "
            f"{OLDEST_CUDA_ARCHITECTURE}.0 and later. Older GPUs compute with PyTorch's own operators."
        )
    return found


def architecture_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for what architecture_list() gives."""
    flags = []
    for item in architectures:
        number = item.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if item.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Build:
    """Compiles and links one library with the compiler's own command line."""

    def __init__(self, name: str, temporary: Path) -> None:
        self.torch = import_torch()
        self.compiler = find_compiler()
        self.temporary = temporary / name
        package = Path(self.torch.__file__).parent
        includes = [package / "include", package / "include" / "torch" / "csrc" / "api" / "include"]
        self.common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-std=c++17", "-O3"]
        self.includes = [flag for path in includes for flag in ("-isystem", str(path))]
        self.cxx_flags = [
            "-fPIC",
            "-fvisibility=hidden",
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        self.libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        self.torch_libraries = package / "lib"

    def compile_command(self, source: Path, target: Path) -> list[str]:
        return [
            *self.compiler, *self.common, *self.cxx_flags, *self.includes, "-c", str(source), "-o", str(target)
        ]  # fmt: skip

    def is_wanted(self, source: Path) -> bool:
        """Whether a source belongs to this build."""
        return True

    def run(self, sources: list[Path], headers: list[Path], library: Path) -> None:
        """Build `library`; a source is compiled again only if it, a header or the command has changed."""
        self.temporary.mkdir(parents=True, exist_ok=True)
        newest_header = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
        objects, commands = [], []
        for source in filter(self.is_wanted, sources):
            target = self.temporary / (source.name + ".o")
            command = self.compile_command(source, target)
            note = target.with_suffix(".command")
            text = f"{self.torch.__version__}\n{shlex.join(command)}"
            objects.append(target)
            if (
                target.exists()
                and note.exists()
                and note.read_text() == text
                and target.stat().st_mtime > max(newest_header, source.stat().st_mtime)
            ):
                continue
            commands.append((source, command, note, text))
        with ThreadPoolExecutor(job_count()) as pool:
            list(pool.map(self._compile, commands))
        partial = library.with_name(library.name + ".partial")
        library.parent.mkdir(parents=True, exist_ok=True)
        execute([*self.compiler, "-shared", *map(str, objects), *self.libraries, "-o", str(partial)])
        # Never written in place: a running Python may have the old library mapped.
        partial.replace(library)

    @staticmethod
    def _compile(job: tuple[Path, list[str], Path, str]) -> None:
        source, command, note, text = job
        note.unlink(missing_ok=True)
        try:
            execute(command)
        except NotBuilt as error:
            if source.name not in KERNELS_FOR_NEW_COMPILERS:
                raise
            # Without a note: the next build tries again.
            execute([*command, "-DCCNET_LEAVE_OUT_KERNEL"])
            announce(
                f"ccnet_d2: {source.name} is left out, the other kernels take its place: {error}\n"
                "A newer compiler builds it."
            )
            return
        note.write_text(text)


class CudaBuild(Build):
    """The same with nvcc for .cu files."""

    def __init__(self, name: str, temporary: Path) -> None:
        super().__init__(name, temporary)
        forced = os.environ.get("FORCE_CUDA")
        if forced == "0":
            raise NotBuilt("FORCE_CUDA=0 asks to leave it out.")
        if forced not in (None, "", "1"):
            raise NotBuilt(
                f"FORCE_CUDA={forced} is unknown: set 1 (build it without a GPU), 0 (leave it out), or leave it unset."
            )
        if self.torch.version.cuda is None:
            raise NotBuilt(f"the installed torch, {self.torch.__version__}, is built without CUDA.")
        if forced != "1" and not self.torch.cuda.is_available():
            raise NotBuilt("torch sees no GPU here: set FORCE_CUDA=1 to build it all the same.")
        toolkit = find_cuda_toolkit()
        self.nvcc = toolkit / "bin" / "nvcc"
        self.check_toolkit()
        self.common += ["-DUSE_CUDA"]
        self.includes += ["-isystem", str(toolkit / "include")]
        architectures = architecture_list(
            os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
        )
        self.architecture_flags = architecture_flags(architectures)
        named = {re.sub(r"[af]?(\+PTX)?$", "", item) for item in architectures}
        self.special = {
            prefix: nvcc_name for prefix, (name, nvcc_name) in ARCHITECTURE_KERNELS.items() if name in named
        }
        self.common += [f"-DCCNET_{prefix.strip('_').upper()}" for prefix in self.special]
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (toolkit / folder).is_dir():
                self.libraries.append(f"-L{toolkit / folder}")
        self.libraries += ["-ltorch_cuda", "-lcudart"]

    def check_toolkit(self) -> None:
        """Refuse a toolkit of another major version than torch's: its runtime would be a second one."""
        text = subprocess.run([str(self.nvcc), "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        if match is None:
            raise NotBuilt(f"{self.nvcc} --version names no release.")
        if match[1] != self.torch.version.cuda.split(".")[0]:
            raise NotBuilt(
                f"{self.nvcc} is of CUDA {match[1]}.{match[2]} and torch of CUDA {self.torch.version.cuda}: "
                "set CUDA_HOME to a toolkit of the same major version."
            )

    def host_compiler(self) -> list[str]:
        """nvcc's flags for the compiler that CXX names: by itself nvcc takes the g++ on PATH, which may be none that it
        knows, or not there."""
        if not os.environ.get("CXX", "").strip() or os.environ.get("NVCC_CCBIN"):
            return []
        words = [word for word in self.compiler if Path(word).name not in COMPILER_LAUNCHERS]
        return ["-ccbin", words[0]] if words else []

    def is_wanted(self, source: Path) -> bool:
        return not source.name.startswith(tuple(ARCHITECTURE_KERNELS)) or source.name.startswith(
            tuple(self.special)
        )

    def compile_command(self, source: Path, target: Path) -> list[str]:
        if source.suffix != ".cu":
            return super().compile_command(source, target)
        flags = self.architecture_flags
        for prefix, name in self.special.items():
            if source.name.startswith(prefix):
                flags = [f"-gencode=arch=compute_{name},code=sm_{name}"]
        return [
            str(self.nvcc), *self.host_compiler(), *self.common, "-Xcompiler", "-fPIC", *flags, *self.includes, "-c",
            str(source), "-o", str(target),
        ]  # fmt: skip


def execute(command: list[str]) -> None:
    """Run a compiler; NotBuilt holds what it said."""
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise NotBuilt(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise NotBuilt(
            f"the compiler failed (exit status {done.returncode}):\n{done.stdout}\n{shlex.join(command)}"
        )
    if done.stdout:
        print(done.stdout, flush=True)


BUILDS = {"ccnet_d2.ops._C_cpu": Build, "ccnet_d2.ops._C_cuda": CudaBuild}


class BuildLibraries(build_ext):
    """`build_ext` for libraries that know nothing of Python."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path("csrc") / ext.name.rpartition("_")[2]
        sources = [ROOT / name for name in ext.sources]
        headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / folder).glob("*.h"), *(ROOT / folder).glob("*.cuh")]
        library = Path(self.get_ext_fullpath(ext.name))
        note = library.with_suffix(REASON_SUFFIX)
        note.unlink(missing_ok=True)
        try:
            if wish() == "0":
                raise NotBuilt("CCNET_EXT=0 asks to leave it out.")
            build = BUILDS[ext.name](ext.name.rpartition(".")[2], Path(self.build_temp).resolve())
            build.run(sources, headers, library.resolve())
        except NotBuilt as error:
            # A library of an earlier build would be of other sources than the Python beside it.
            library.unlink(missing_ok=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            if not ext.optional:
                raise SetupError(
                    f"{folder} was not built, and CCNET_EXT=require asks for it: {error}"
                ) from error
            announce(
                f"ccnet_d2: the compiled operator for {ext.name.rpartition('_')[2].upper()} is NOT built: {error}\n"
                "The package works without it, on PyTorch's own operators."
            )

    def copy_extensions_to_source(self) -> None:
        """For an install in place: what was built goes beside the sources, and what was not built goes from there."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            built, in_place = Path(self.build_lib, name), ROOT / name
            for suffix in (built.suffix, REASON_SUFFIX):
                source, target = built.with_suffix(suffix), in_place.with_suffix(suffix)
                if not source.exists():
                    target.unlink(missing_ok=True)
                elif suffix == REASON_SUFFIX:
                    shutil.copyfile(source, target)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit function


class BuildWheel(bdist_wheel):
    """`bdist_wheel` whose wheel is for every machine if no library was built."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            build_ext = self.get_finalized_command("build_ext")
            names = [build_ext.get_ext_fullpath(ext.name) for ext in self.distribution.ext_modules or []]
            if not any(Path(name).exists() for name in names):
                self.distribution.ext_modules = []
                self.root_is_pure = True


def is_required(name: str) -> bool:
    """Whether an unbuilt library is an error: the CUDA one only where it was asked for by name."""
    return wish() == "require" and (name.endswith("_cpu") or os.environ.get("FORCE_CUDA") == "1")


def extensions() -> list[Extension]:
    """The libraries to try, with their sources relative to this file; optional, so that one may be missing."""
    found = []
    for name in BUILDS:
        folder = Path("csrc") / name.rpartition("_")[2]
        sources = sorted(
            str(path.relative_to(ROOT)) for kind in ("*.cpp", "*.cu") for path in (ROOT / folder).glob(kind)
        )
        if sources:
            found.append(Extension(name, sources, optional=not is_required(name)))
    return found


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildLibraries},
        # The libraries serve every Python of this or a newer version.
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
