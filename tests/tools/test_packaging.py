"""pyproject.toml and constraints.txt against the tree and against each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import ccnet_d2
import pip_wheel
import setup_environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normalized(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def constraints() -> dict[str, list[str]]:
    """Lines of constraints.txt by package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            found.setdefault(normalized(line), []).append(line)
    return found


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    in_tree = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "ccnet_d2").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert sorted(in_tree | {"ccnet_d2.model_zoo.configs"}) == sorted(listed)
    assert pyproject["tool"]["setuptools"]["package-dir"] == {"ccnet_d2.model_zoo.configs": "configs"}


def test_every_subpackage_is_an_attribute_of_the_package() -> None:
    in_tree = {path.parent.name for path in (ROOT / "ccnet_d2").glob("*/__init__.py")}
    assert in_tree == set(ccnet_d2.__all__) - {"__version__", "add_rcca"}


def test_version_can_be_read_without_importing(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ccnet_d2.__version__"}
    text = (ROOT / "ccnet_d2" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', text, flags=re.MULTILINE)


def test_constraints_are_exact() -> None:
    for lines in constraints().values():
        for line in lines:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[^;\s*]+(; python_version (<|==|>=) '3\.\d+')?", line), (
                line
            )


def test_constraints_cover_what_is_installed(pyproject: dict[str, Any]) -> None:
    wanted = {normalized(r) for r in pyproject["project"]["dependencies"]}
    for requirements in pyproject["project"]["optional-dependencies"].values():
        wanted |= {normalized(r) for r in requirements}
    wanted |= {*setup_environment.BUILD_TOOLS, *setup_environment.TORCH}
    assert wanted - {"ccnet-d2"} <= set(constraints())


def test_pip_is_the_same_with_and_without_ensurepip() -> None:
    version = re.fullmatch(r"pip-(.+)-py3-none-any\.whl", pip_wheel.PIP_WHEEL)
    assert version and constraints()["pip"] == [f"pip=={version[1]}"]


def test_python_versions_agree(pyproject: dict[str, Any]) -> None:
    classified = {
        tuple(map(int, c.rsplit(" ", 1)[1].split(".")))
        for c in pyproject["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", c)
    }
    assert min(classified) == setup_environment.OLDEST and max(classified) == setup_environment.NEWEST
    assert pyproject["project"]["requires-python"] == ">=" + ".".join(map(str, setup_environment.OLDEST))
    assert f"sys.version_info[:2] <= {setup_environment.NEWEST}" in (ROOT / "Makefile").read_text(
        encoding="utf-8"
    )


def test_set_up_looks_for_the_compilers_that_the_build_looks_for() -> None:
    build = (ROOT / "setup.py").read_text(encoding="utf-8")
    compilers, (nvcc, *toolkits) = setup_environment.BUILD_PROGRAMS.values()
    names = ", ".join(f'"{name}"' for name in compilers)
    assert f"for name in ({names}):" in build and f'which("{nvcc}")' in build
    folders = ", ".join(f'Path("{Path(path).parents[1]}")' for path in toolkits)
    assert f"[{folders}]" in build
