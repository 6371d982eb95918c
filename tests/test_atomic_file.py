"""Files that are whole or not there: writes that fail, killed processes, several at once."""

import errno
import os
import time
from pathlib import Path

import pytest

from ccnet_d2.atomic_file import atomic_write, atomic_write_text, remove_temporary_files


def test_files_appear_whole_and_synced(tmp_path, monkeypatch):
    """Data are on the disk before the name is, and the name before anything goes on."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def told(*arguments, name=name, original=original):
            place = arguments[0] if name == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
            size = os.path.getsize(place) if Path(place).is_file() else 0
            done.append((name, Path(place), size))
            return original(*arguments)

        monkeypatch.setattr(os, name, told)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [(name, size) for name, _, size in done] == [("fsync", 3), ("replace", 3), ("fsync", 0)]
    assert done[0][1] == done[1][1] and done[1][1].parent == done[2][1] == tmp_path


def test_two_that_write_one_file_at_once_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as first:
        first.write(b"first")
        first.flush()
        with atomic_write(path) as second:
            second.write(b"the second, which is longer")
        assert path.read_bytes() == b"the second, which is longer"
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_of_a_file_goes_with_the_next_write(tmp_path):
    """Once nobody has written to it for an hour; not what another process writes now, nor what is named alike."""
    path = tmp_path / "a[1]"
    if os.fork() == 0:
        with atomic_write(path):
            os._exit(0)
    os.wait()
    (left,) = tmp_path.iterdir()
    others = {"a[1].notes.tmp", "a[1].12345678", "b.12345678.tmp", "a1.12345678.tmp"}
    for name in others:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    for age, remaining in ((3500, {left.name}), (3700, set())):
        os.utime(left, (time.time() - age,) * 2)
        atomic_write_text(path, "")
        assert {p.name for p in tmp_path.iterdir()} == {path.name} | others | remaining


@pytest.mark.parametrize("name", ["x" * 251 + ".pth", "x" * 243, "ü" * 120 + "[1].pth"])
def test_names_as_long_as_names_can_be(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        (temporary,) = {p.name for p in tmp_path.iterdir()} - {name}
        assert temporary.removesuffix(".tmp").rpartition(".")[0] == name[-len(temporary) + 13 :]
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == [name]
    # What was left of such files is found as well, by their names and by the ends of them.
    left = tmp_path / temporary
    for remove in (
        lambda: atomic_write_text(path, ""),
        lambda: remove_temporary_files(tmp_path, f"*{name[-4:]}"),
    ):
        left.touch()
        os.utime(left, (0, 0))
        remove()
        assert [p.name for p in tmp_path.iterdir()] == [name]


def test_names_that_are_too_long_are_refused_before_anything_is_written(tmp_path):
    for name in ("x" * 256, "ü" * 128, "x" * 300):
        with pytest.raises(OSError, match=f"File name too long: '.*/{name}'"), atomic_write(tmp_path / name):
            pytest.fail("there is nothing to write to")


def test_what_another_user_left_of_a_file_stays(tmp_path, monkeypatch):
    """In a folder such as /tmp nobody may delete it but that user."""
    left = tmp_path / "file.12345678.tmp"
    left.touch()
    os.utime(left, (0, 0))

    def refuse(path, missing_ok=False):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    atomic_write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and left.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_a_write_that_fails(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


def test_texts_are_utf_8_and_no_descriptor_is_left(tmp_path):
    opened = os.listdir("/proc/self/fd")
    atomic_write_text(tmp_path / "file", "3 × 3 → 1\n")
    assert (tmp_path / "file").read_bytes() == "3 × 3 → 1\n".encode()
    assert len(os.listdir("/proc/self/fd")) == len(opened)


def test_file_systems_that_cannot_sync_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor, number):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    for number in (errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", lambda descriptor, number=number: refuse(descriptor, number))
        with atomic_write(tmp_path / "a") as file:
            file.write(b"x")
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, errno.EIO))
    with pytest.raises(OSError, match="Input/output"), atomic_write(tmp_path / "b") as file:
        file.write(b"x")
