"""Why a compiled library is missing."""

import pytest
import torch

from ccnet_d2.ops import _library

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
