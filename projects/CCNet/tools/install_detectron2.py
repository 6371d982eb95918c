#!/usr/bin/env python
"""Install Detectron2 into the environment of the Python that runs this script.

    python projects/CCNet/tools/install_detectron2.py                      # 0.5, pure Python, from PyPI
    DETECTRON2=git+https://… python projects/CCNet/tools/install_detectron2.py   # any other pip requirement

Detectron2 is not on PyPI under its own name. Version 0.5 is there as the source archive ``detectron2-cdo``,
which lacks the C++ sources, so that pip cannot build it. Its Python part is complete, and ccnet_d2 needs no
more: this script makes a pure-Python wheel named ``detectron2`` from that archive and installs it. What needs
the missing extension (deformable convolution on a GPU, rotated boxes) says so when it is used; COCO
evaluation takes pycocotools' own implementation.

Nothing happens if Detectron2 can be imported already, unless a requirement or ``--force`` is given.
Standard library only; torch must be installed already, because upstream's setup.py imports it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from detectron2_wheel import SDIST, SDIST_PROJECT, SDIST_SHA256, Pip, build_wheel
from package_index import fetch_file
from pip_runner import InstallError, run_pip

# For the builds where the environment has none; 82 removed pkg_resources, which upstream imports.
BUILD_TOOLS = ("setuptools>=64,<82", "wheel")


def import_detectron2(module: str = "detectron2") -> tuple[str | None, str]:
    """Import Detectron2 in a Python of its own.

    Args:
        module: what to import.

    Returns:
        Version and place, None if the import failed; and the last line of the error.
    """
    program = (
        f"import {module}, detectron2, os;"
        "print(detectron2.__version__, 'at', os.path.dirname(os.path.abspath(detectron2.__file__)))"
    )
    # Elsewhere, so that a directory of that name beside the user is not taken for the package.
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            check=False,
        )
    if result.returncode == 0:
        return result.stdout.strip(), ""
    return None, (result.stderr.strip().splitlines() or ["it ended without a message"])[-1]


def provide_setuptools(directory: Path, pip: Pip) -> dict[str, str]:
    """Return the environment in which pip finds setuptools without build isolation; nothing else changes."""
    if importlib.util.find_spec("setuptools") is not None:
        return {}
    pip(["install", "--target", directory, *BUILD_TOOLS], what="Getting setuptools for the build")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}


def require_torch() -> None:
    """Raise InstallError if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            f"torch is not installed for {sys.executable}: install torch and torchvision first,"
            " Detectron2 needs both."
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``DETECTRON2`` in the environment is the default of ``--requirement``."""
    parser = argparse.ArgumentParser(
        description="Install Detectron2 into the environment of the Python that runs this script.",
        epilog="Without a requirement: Detectron2 0.5 from PyPI, pure Python, unless one is already there.",
    )
    parser.add_argument(
        "--requirement",
        default=os.environ.get("DETECTRON2", ""),
        help="pip requirement of another Detectron2: a git URL, a directory, a wheel (default: $DETECTRON2)",
    )
    parser.add_argument(
        "--force", action="store_true", help="install even if Detectron2 can be imported already"
    )
    parser.add_argument("--constraint", type=Path, help="pip constraints file for what Detectron2 needs")
    parser.add_argument("--sdist", type=Path, help=f"use this copy of {SDIST} instead of downloading it")
    parser.add_argument("--log", type=Path, help="append all of pip's output to this file")
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        help="only build the wheel of 0.5, leave it in this directory and install nothing",
    )
    return parser.parse_args(argv)


def install(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for; see the module's docstring."""
    constraint: list[str | Path] = []
    if arguments.constraint:
        if not arguments.constraint.is_file():
            raise InstallError(f"The constraints file {arguments.constraint} does not exist.")
        constraint = ["--constraint", arguments.constraint.resolve()]
    requirement = arguments.requirement.strip()
    if requirement.startswith(("/", "./", "../", "~")):
        path = Path(requirement).expanduser().resolve()
        if not path.exists():
            raise InstallError(f"There is no {path}, which DETECTRON2 names.")
        requirement = str(path)
    present, _ = import_detectron2()
    if present and not (requirement or arguments.force or arguments.wheel_dir):
        print(f"Detectron2 {present} is kept.")
        return

    require_torch()
    with tempfile.TemporaryDirectory(prefix="install-detectron2-") as directory:
        work = Path(directory)
        pip = functools.partial(run_pip, log=arguments.log)
        pip = functools.partial(pip, extra_env=provide_setuptools(work / "tools", pip))
        if requirement and not arguments.wheel_dir:
            # Every source tree of Detectron2 imports torch in its setup.py, so its build cannot be isolated.
            pip(
                ["install", "--no-build-isolation", *constraint, requirement],
                what=f"Installing Detectron2 from {requirement}",
            )
        else:
            archive = arguments.sdist or fetch_file(SDIST_PROJECT, SDIST, SDIST_SHA256, work)
            wheel = build_wheel(archive, arguments.wheel_dir or work / "dist", work, pip)
            if arguments.wheel_dir:
                print(f"Detectron2 wheel: {wheel}")
                return
            again = ["--force-reinstall", "--no-deps"] if present else []
            pip(["install", *again, *constraint, wheel], what="Installing Detectron2 0.5")

    version, error = import_detectron2("detectron2.model_zoo")
    if version is None:
        hint = ": install 'setuptools<82', the last to have it" if "pkg_resources" in error else ""
        raise InstallError(f"Detectron2 was installed but cannot be imported ({error}){hint}.")
    print(f"Detectron2 {version} is installed.")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        install(parse_arguments(argv))
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # disk full, read-only directory
        print(
            f"install_detectron2: {error.filename or 'the system'}: {error.strerror or error}.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted; run it again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
