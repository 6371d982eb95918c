#!/usr/bin/env python3
"""Make the project's environment, .venv: what `make setup` runs, and every other target before its own work.

    python3 projects/CCNet/tools/setup_environment.py

Needs Python 3.10-3.14 and a reachable package index, nothing else: no pip, no venv package of the
distribution, no compiler, no GPU. It runs in stages (environment, build tools, torch, Detectron2, this
project, a check). A stage that succeeded leaves a stamp with the hash of what determined it, so that running
again does nothing until one of those things changes, and an interrupted set-up goes on where it was.

Environment variables:
    DETECTRON2: a pip requirement of another Detectron2 than 0.5 from PyPI (see install_detectron2.py).
    FORCE_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST, CCNET_EXT, CXX, CXXFLAGS, NVCC_CCBIN, MAX_JOBS: how the compiled
        operator is built, see setup.py; setting one to something new builds it again.

Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pip_runner import InstallError, run_command, run_pip
from pip_wheel import get_pip_wheel

ROOT = Path(__file__).resolve().parents[3]
OLDEST, NEWEST = (3, 10), (3, 14)

BUILD_TOOLS = ("pip", "setuptools", "wheel", "ninja")
TORCH = ("torch", "torchvision")
# headless: OpenCV without windows, because the ordinary package needs system libraries a bare machine lacks.
PROJECT_EXTRAS = "dev,headless"
# What setup.py looks at.
BUILD_VARIABLES = (
    "CCNET_EXT",
    "FORCE_CUDA",
    "CUDA_HOME",
    "CUDA_PATH",
    "TORCH_CUDA_ARCH_LIST",
    "CXX",
    "CXXFLAGS",
    "NVCC_CCBIN",
    "MAX_JOBS",
)
# What it looks for; it cannot be asked before setuptools is there.
BUILD_PROGRAMS = {
    "C++ compiler": ("c++", "g++", "clang++"),
    "nvcc": ("nvcc", "/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"),
}
# What a finished environment takes, and what pip holds besides while it makes it (measured: 6.5 GB and 3 GB).
NEEDED_BYTES = 10 * 10**9

CHECK = "import torch, torchvision, cv2, scipy, detectron2.model_zoo, ccnet_d2.layers, pytest"


class Stage(NamedTuple):
    """A step of the set-up and what its result depends on."""

    name: str
    title: str
    run: Callable[[], None]
    # Files and words whose change makes the stage run again.
    inputs: str
    # Environment variables, and programs, that make it run again when they are set to something else than the last
    # time; leaving one out keeps what is there.
    wishes: dict[str, str]


def check_python(version: tuple[int, int], executable: str) -> None:
    """Raise InstallError unless the Python version is one that the project runs on."""
    if not OLDEST <= version <= NEWEST:
        raise InstallError(
            f"{executable} is Python {version[0]}.{version[1]}, and the project needs Python"
            f" {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}: name one, for example"
            " `make setup PYTHON=/usr/bin/python3.11`."
        )


def hash_of(root: Path, names: Iterable[str], *words: str) -> str:
    """Return a hash of files, directories (all files below) and words; a missing file counts as such."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(f"word {word}\n".encode())
    for name in names:
        path = root / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            relative = file.relative_to(root).as_posix()
            if file.is_file():
                digest.update(f"file {relative} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
            else:
                digest.update(f"missing {relative}\n".encode())
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def drop_incomplete_distributions(site_packages: Path) -> list[str]:
    """Forget the distributions that an interrupted pip left half installed, so that pip installs them again.

    pip writes a distribution's RECORD last; one that lacks it is incomplete, and pip would take it for
    installed. A name that starts with ~ is an old version that pip had put aside.

    Args:
        site_packages: the environment's site-packages directory.

    Returns:
        Names of the entries removed.
    """
    removed = []
    for entry in sorted(site_packages.iterdir()):
        incomplete = entry.name.endswith(".dist-info") and not (entry / "RECORD").is_file()
        if incomplete or entry.name.startswith("~"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
            removed.append(entry.name)
    return removed


class Environment:
    """The environment in ``.venv`` and the stages that make it.

    Args:
        root: the checkout.
        chosen_python: the user named the Python that runs this; an environment of another version is remade.
    """

    def __init__(self, root: Path = ROOT, *, chosen_python: bool = False) -> None:
        self.root = root
        self.chosen_python = chosen_python
        self.venv = root / ".venv"
        self.discarded = root / ".venv-removed"
        self.python = self.venv / "bin" / "python"
        self.state = self.venv / ".setup"
        self.log = self.venv / "setup.log"
        self.constraints = root / "constraints.txt"
        # Temporary files are kept here: /tmp is often small, and what a killed pip leaves behind is found again.
        self.temporary = self.state / "tmp"
        # There while a stage works, so that the next run knows that one was interrupted.
        self.working = self.state / "working"
        # There until the environment itself is complete; a half-made one is no use and is remade.
        self.unfinished = self.state / "unfinished"

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        tools = "projects/CCNet/tools"
        build = {name: os.environ[name] for name in BUILD_VARIABLES if os.environ.get(name)}
        # One that is installed later is a reason to build; which one it is, is not.
        build |= {name: "found" for name, names in BUILD_PROGRAMS.items() if any(map(shutil.which, names))}
        chosen = os.environ.get("DETECTRON2", "").strip()
        detectron2 = {"DETECTRON2": chosen} if chosen else {}

        def inputs(*names: str, words: Iterable[str] = ()) -> str:
            return hash_of(self.root, ("constraints.txt", *names), *words)

        return [
            Stage("tools", "build tools", self.install_tools, inputs(words=BUILD_TOOLS), {}),
            Stage(
                "torch", "torch (large: some 3 GB to download)", self.install_torch, inputs(words=TORCH), {}
            ),
            Stage(
                "detectron2",
                "Detectron2",
                self.install_detectron2,
                inputs(f"{tools}/install_detectron2.py", f"{tools}/detectron2_wheel.py"),
                detectron2,
            ),
            Stage(
                "project",
                "ccnet_d2 and the tools of its developers",
                self.install_project,
                inputs("pyproject.toml", "setup.py", "csrc", words=[PROJECT_EXTRAS]),
                build,
            ),
            Stage("check", "check", self.check, inputs(words=[CHECK]), {}),
        ]

    def run(self) -> bool:
        """Make or complete the environment; returns whether anything was done."""
        start = time.monotonic()
        check_python(sys.version_info[:2], sys.executable)
        self.clear_discarded()
        stages = self.stages()
        done = self.make_venv(len(stages) + 1)
        if self.working.exists():
            self.repair()
        for number, stage in enumerate(stages, start=2):
            # The check is of all that came before.
            if self.is_done(stage) and not (done and stage.name == "check"):
                continue
            print(f"[{number}/{len(stages) + 1}] {stage.title}", flush=True)
            self.stamp(stage).unlink(missing_ok=True)
            self.working.touch()
            self.temporary.mkdir(exist_ok=True)
            stage.run()
            write_atomically(self.stamp(stage), json.dumps({"inputs": stage.inputs, "wishes": stage.wishes}))
            self.working.unlink()
            shutil.rmtree(self.temporary, ignore_errors=True)
            done = True
        if done:
            print(f"The environment {self.venv} is ready ({time.monotonic() - start:.0f} s).", flush=True)
        return done

    def stamp(self, stage: Stage) -> Path:
        """Return the file that says that a stage succeeded."""
        return self.state / f"{stage.name}.json"

    def is_done(self, stage: Stage) -> bool:
        """Return whether the stage succeeded for the same inputs and nothing new is wished for."""
        try:
            stamp = json.loads(self.stamp(stage).read_text(encoding="utf-8"))
            inputs, wishes = stamp["inputs"], stamp["wishes"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return bool(inputs == stage.inputs) and all(wishes.get(k) == v for k, v in stage.wishes.items())

    def venv_version(self) -> tuple[int, int] | None:
        """Return the version of the environment's Python, None if it does not run or has no pip."""
        program = (
            "import sys, importlib.util as u; print(*sys.version_info[:2], u.find_spec('pip') is not None)"
        )
        try:
            result = subprocess.run(
                [str(self.python), "-c", program], capture_output=True, text=True, timeout=60, check=True
            )
            major, minor, has_pip = result.stdout.split()
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        return (int(major), int(minor)) if has_pip == "True" else None

    def make_venv(self, stages: int) -> bool:
        """Make ``.venv`` unless a usable one is there; returns whether it was made.

        Raises:
            InstallError: there is a ``.venv`` that this script did not make and that is of no use.
        """
        place = self.state / "place"
        ours = place.exists() or self.unfinished.exists()
        if self.venv.exists() or self.venv.is_symlink():
            version = self.venv_version() if not self.unfinished.exists() else None
            usable = version is not None and OLDEST <= version <= NEWEST
            if ours:
                # Scripts of an environment that was moved or copied start the Python of the old place.
                usable = usable and place.exists() and place.read_text(encoding="utf-8") == str(self.venv)
                usable = usable and not (self.chosen_python and version != sys.version_info[:2])
            elif not usable:
                raise InstallError(
                    f"{self.venv} exists, was not made by this set-up, and holds no Python"
                    f" {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} with pip: move it away."
                )
            if usable:
                if not ours:
                    self.state.mkdir(exist_ok=True)
                    write_atomically(place, str(self.venv))
                return False
            # Renamed first: whenever this is interrupted, .venv is either whole or gone.
            self.venv.rename(self.discarded)
            self.clear_discarded()

        print(f"[1/{stages}] environment {self.venv} with Python {sys.version.split()[0]}", flush=True)
        self.require_space()
        self.state.mkdir(parents=True)
        self.unfinished.touch()
        self.create()
        write_atomically(place, str(self.venv))
        self.unfinished.unlink()
        return True

    def create(self) -> None:
        """Make an environment with pip, from whatever this Python has for that."""
        if importlib.util.find_spec("venv") is None:
            raise InstallError(f"{sys.executable} lacks the module venv: apt install python3-venv.")
        has_ensurepip = importlib.util.find_spec("ensurepip") is not None
        run_command(
            [sys.executable, "-m", "venv", *([] if has_ensurepip else ["--without-pip"]), str(self.venv)],
            what=f"Making the environment {self.venv}",
            log=self.log,
        )
        if not has_ensurepip:
            self.install_pip()

    def clear_discarded(self) -> None:
        """Delete the environment that was put aside, perhaps by a run that was interrupted at this."""
        if self.discarded.is_symlink():
            self.discarded.unlink()
        elif self.discarded.exists():
            shutil.rmtree(self.discarded)

    def install_pip(self) -> None:
        """Put pip into an environment that was made without: the system's, or the package index's."""
        fetched = self.state / "pip"
        fetched.mkdir()
        wheel = get_pip_wheel(fetched)
        # A wheel of pip is a zip file that Python can run pip from.
        run_command(
            [str(self.python), f"{wheel}/pip", "install", "--no-index", "--no-deps",
             "--disable-pip-version-check", str(wheel)],
            what="Installing pip",
            log=self.log,
        )  # fmt: skip
        shutil.rmtree(fetched)

    def require_space(self) -> None:
        """Raise InstallError if the disk cannot hold the environment."""
        free = shutil.disk_usage(self.root).free
        if free < NEEDED_BYTES:
            raise InstallError(
                f"{self.root} is on a disk with {free / 1e9:.1f} GB free, and the environment and the"
                f" downloads need {NEEDED_BYTES / 1e9:.0f} GB: free some space and run the command again."
            )

    def repair(self) -> None:
        """Clear away what an interrupted stage left half done."""
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        for site_packages in self.venv.glob("lib/python*/site-packages"):
            removed = drop_incomplete_distributions(site_packages)
            if removed:
                print(f"The last set-up was interrupted; cleared away: {', '.join(removed)}", flush=True)

    def variables(self) -> dict[str, str]:
        """Return the environment variables for what installs into the environment."""
        # PIP_USER, which some clusters set for everybody, is refused in environments like this one.
        return {"TMPDIR": str(self.temporary), "PIP_USER": "0"}

    def pip_install(self, arguments: Iterable[str], what: str) -> None:
        """Run pip install in the environment, within the constraints."""
        run_pip(
            ["install", "--constraint", self.constraints, *arguments],
            what=what,
            python=self.python,
            log=self.log,
            extra_env=self.variables(),
        )

    def install_tools(self) -> None:
        """Install what builds packages, pip itself included."""
        self.pip_install(BUILD_TOOLS, "Installing the build tools")

    def install_torch(self) -> None:
        """Install torch and torchvision."""
        self.pip_install(TORCH, "Installing torch")

    def install_detectron2(self) -> None:
        """Install Detectron2, unless it can be imported already."""
        script = self.root / "projects" / "CCNet" / "tools" / "install_detectron2.py"
        run_command(
            [str(self.python), str(script), "--constraint", str(self.constraints), "--log", str(self.log)],
            what="Installing Detectron2",
            environment={**os.environ, **self.variables()},
        )

    def install_project(self) -> None:
        """Install this project in place; its compiled operator is built against the environment's torch."""
        self.pip_install(
            # Verbose, so that the log holds what the compiler said.
            ["--verbose", "--no-build-isolation", "--editable", f"{self.root}[{PROJECT_EXTRAS}]"],
            "Installing ccnet_d2",
        )
        libraries = sorted(
            path.stem.removeprefix("_C_") for path in (self.root / "ccnet_d2").rglob("_C_*.so")
        )
        if libraries:
            print(f"    compiled operator: built for {' and '.join(libraries)}", flush=True)
        else:
            print(f"    compiled operator: not built, PyTorch's are used ({self.log} says why)", flush=True)

    def check(self) -> None:
        """Check that what was installed fits together and can be imported."""
        run_pip(["check"], what="The check of the installed packages", python=self.python, log=self.log)
        run_command(
            [str(self.python), "-W", "ignore", "-c", CHECK],
            what="Importing the installed packages",
            log=self.log,
            cwd=self.venv,
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Make the project's environment, .venv; does nothing if it is there."
    )
    parser.add_argument(
        "--chosen-python",
        action="store_true",
        help="remake an environment whose Python version differs from the one that runs this script",
    )
    arguments = parser.parse_args(argv)
    try:
        # Two make commands at once take turns; the lock goes with the process.
        with (ROOT / "constraints.txt").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Waiting for another set-up of this checkout ...", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            Environment(chosen_python=arguments.chosen_python).run()
    except InstallError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # disk full, read-only directory
        print(f"set-up: {error.filename or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; run the command again, it goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
