"""Folders that are written whole: what killed processes leave, and several at once."""

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ccnet_d2 import atomic_folder
from ccnet_d2.atomic_folder import replace_folder, scratch_beside


def killed(work: Callable[[], None]) -> None:
    """Do it in a process that then gets SIGKILL, which leaves no chance to clean up."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def write_and_die(folder: Path) -> None:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_processes_left_goes_where_names_hold_brackets(tmp_path):
    killed(lambda: replace_folder(tmp_path / "set[1]", write_and_die))
    assert len(list(tmp_path.iterdir())) == 1
    replace_folder(tmp_path / "set[1]", lambda new: None)
    assert [path.name for path in tmp_path.iterdir()] == ["set[1]"]


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    (tmp_path / ".set-mine").mkdir()
    with scratch_beside(tmp_path / "set") as alive:
        killed(lambda: replace_folder(tmp_path / "set", write_and_die))
        assert len(list(tmp_path.iterdir())) == 3
        assert replace_folder(tmp_path / "set", lambda new: (new / "whole").touch())
        assert {path.name for path in tmp_path.iterdir()} == {".set-mine", alive.name, "set"}
    assert {path.name for path in tmp_path.iterdir()} == {".set-mine", "set"}


@pytest.mark.parametrize("there", [["set", "set/old"], ["set"], []])
def test_a_folder_that_cannot_be_put_in_place_is_as_it_was(tmp_path, monkeypatch, there):
    """So is a file in its place; where there was nothing, the error is that of the folder all the same."""
    for path in there:
        if path == "set" and len(there) > 1:
            (tmp_path / path).mkdir()
        else:
            (tmp_path / path).write_text("old")
    rename = os.rename

    def refuse(path: str | Path, target: str | Path) -> None:
        if Path(path).name == "new":
            raise PermissionError(1, "Operation not permitted")
        rename(path, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        replace_folder(tmp_path / "set", lambda new: (new / "new").touch())
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == there
    assert not there or (tmp_path / there[-1]).read_text() == "old"


def test_a_folder_that_cannot_be_moved_away_is_left(tmp_path, monkeypatch):
    """As one on which a disk is mounted; what is to take its place never could."""
    (tmp_path / "set" / "old").mkdir(parents=True)
    rename, moves = os.rename, []

    def refuse(path: str | Path, target: str | Path) -> None:
        moves.append(path)
        if path == tmp_path / "set" or len(moves) > 9:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(path, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="busy"):
        replace_folder(tmp_path / "set", lambda new: None)
    assert len(moves) == 2 and [path.name for path in tmp_path.rglob("*")] == ["set", "old"]


def test_what_the_folder_lies_in_is_made(tmp_path):
    assert replace_folder(tmp_path / "new" / "one" / "set", lambda new: (new / "file").touch())
    assert (tmp_path / "new/one/set/file").is_file()


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with scratch_beside(tmp_path / "set") as mine:
        assert replace_folder(tmp_path / "set", lambda new: (new / "file").touch())
        assert {path.name for path in tmp_path.iterdir()} == {"set", mine.name}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_another_process_left_may_be_another_s_or_go_meanwhile(tmp_path, monkeypatch):
    (tmp_path / ".set-another" / "ccnet_d2.lock").mkdir(parents=True)  # which cannot be opened
    replace_folder(tmp_path / "set", lambda new: None)
    assert {path.name for path in tmp_path.iterdir()} == {"set", ".set-another"}

    def goes(lock: Path) -> bool:
        shutil.rmtree(lock.parent)
        return True

    monkeypatch.setattr(atomic_folder, "_is_free", goes)
    assert replace_folder(tmp_path / "set", lambda new: None)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_who_comes_second_replaces_the_first_or_leaves_it(tmp_path, monkeypatch):
    """Another process puts its own there between the two renames."""
    folder, rename = tmp_path / "set", os.rename
    for unless, kept, mode in (
        (lambda: False, "mine", True),
        (lambda: (folder / "theirs").exists(), "theirs", False),
        (lambda: False, "mine", True),
    ):
        turns = iter([True])

        def in_between(path: str | Path, target: str | Path, turns=turns) -> None:
            if Path(path).name == "new" and next(turns, False):
                folder.mkdir()
                (folder / "theirs").touch()
            rename(path, target)

        monkeypatch.setattr(os, "rename", in_between)
        assert replace_folder(folder, lambda new: (new / "mine").touch(), unless) is mode
        assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [
            Path("set"),
            Path("set", kept),
        ]


def test_a_link_stands_for_what_it_leads_to(tmp_path):
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "set")
    replace_folder(tmp_path / "link", lambda new: (new / "file").touch())
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "set" / "file").exists()
    # A file that is a link is replaced itself: what is to take its place lies beside it.
    with scratch_beside(tmp_path / "link") as scratch:
        assert scratch.parent == tmp_path
    # The rights are those of any folder, not those of a temporary one.
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "disk" / "set").stat().st_mode == (tmp_path / "plain").stat().st_mode
