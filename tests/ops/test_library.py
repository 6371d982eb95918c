"""Why a compiled library is missing."""

import os
import re
from pathlib import Path

import pytest
import torch

from ccnet_d2.ops import _library, compiled

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10),
    reason="the compiled op needs torch 2.10",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    return tmp_path


def test_nothing_was_tried(folder):
    assert "`pip install --no-build-isolation .` builds it" in _library.load("_C_cpu")


def test_the_builds_own_reason(folder):
    (folder / "_C_cpu.not_built").write_text("no C++ compiler was found: install one.\n")
    assert _library.load("_C_cpu") == (
        "the extension _C_cpu was not built when the package was installed: no C++ compiler was found: install one."
    )
    assert "no C++ compiler" not in _library.load("_C_cuda")


def test_what_the_compiler_said_stays_in_its_file(folder):
    note = folder / "_C_cpu.not_built"
    note.write_text("the compiler failed (exit status 1):\na.cpp:1: error\nc++ -c a.cpp\n")
    assert _library.load("_C_cpu").endswith(f"the compiler failed (exit status 1) (all of it is in {note}).")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_damaged_note_is_passed_over(folder, content):
    (folder / "_C_cpu.not_built").write_bytes(content)
    assert "is not built; with torch" in _library.load("_C_cpu")


def test_a_damaged_library(folder):
    (folder / "_C_cpu.so").write_bytes(b"no library")
    (folder / "_C_cpu.not_built").write_text("of an earlier build\n")
    assert "cannot be loaded" in _library.load("_C_cpu")


@pytest.mark.skipif(not compiled.is_available(), reason="needs the compiled op")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_library_that_is_cut_short(folder, part):
    """An interrupted installation or a full disk leaves one; loading it is a bus error, which ends Python."""
    whole = Path(_library.__file__).with_name("_C_cpu.so").read_bytes()
    (folder / "_C_cpu.so").write_bytes(whole[: int(len(whole) * part)])
    assert _library.load("_C_cpu") == (
        f"{folder / '_C_cpu.so'} is cut short, as by an interrupted installation or a full disk: build it again."
    )


def test_why_the_system_does_not_load_a_library(folder):
    (folder / "_C_cpu.so").write_bytes(b"no library")
    assert re.search(r"_C_cpu\.so cannot be loaded \(.*(too short|ELF).*\); build", _library.load("_C_cpu"))


def test_the_newest_of_several_builds_is_loaded(folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    names = ["_C_cpu.cpython-311.so", "_C_cpu.so", "_C_cpu.pyd"]
    for age, name in ((9, names[0]), (3, names[1]), (6, names[2])):
        (folder / name).touch()
        os.utime(folder / name, (10_000 - age, 10_000 - age))
    assert _library.load("_C_cpu") is None and loaded == [str(folder / "_C_cpu.so")]


def test_a_library_that_is_not_to_be_loaded(folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    (folder / "_C_cuda.so").touch()
    assert _library.load("_C_cuda", required="it needs another.") == "it needs another."
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert (
        _library.load("_C_cuda")
        == "the compiled operator needs torch 2.10 or newer, this is torch 2.9.1+cu128."
    )
    assert loaded == []


def test_a_library_of_older_sources(folder, monkeypatch):
    """As after a `git pull` without building again."""
    (folder / "_C_cpu.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert _library.load("_C_cpu", operators=["no_such_operator"]) == (
        f"{folder / '_C_cpu.so'} is of other sources than this package, it has no operator no_such_operator: "
        "build it again."
    )


def test_every_operator_of_the_sources_is_asked_for():
    sources = (Path(__file__).resolve().parents[2] / "csrc" / "cpu").glob("*.cpp")
    defined = [name for path in sources for name in re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text())]
    assert sorted(defined) == list(compiled._OPERATORS)
