"""A disk that is full: a clear error, and what was saved before is whole."""

import errno
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ccnet_d2.checkpoint import (
    DiskFullError,
    SafeCheckpointer,
    atomic_file,
    atomic_write,
    load_checkpoint,
    load_file,
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root and its capabilities")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def network(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(256, width)


def test_the_previous_checkpoint_stays(small_disk):
    model = network(900)  # 0.9 MB
    checkpointer = SafeCheckpointer(model, str(small_disk))
    checkpointer.save("model_0000001")
    checkpointer.save("model_0000003")
    with pytest.raises(DiskFullError) as error:
        checkpointer.save("model_0000005")
    message = str(error.value)
    assert "No space left on device" in message and "model_0000003.pth, is whole" in message
    assert sorted(path.name for path in small_disk.iterdir()) == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_0000003.pth",
    ]
    other = network(900)
    torch.nn.init.zeros_(other.weight)
    load_checkpoint(other, checkpointer.get_checkpoint_file())
    assert torch.equal(other.weight, model.weight)


def test_training_stops_and_goes_on(run, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_400_000))  # leaves room for some checkpoints of 0.1 MB
    options = ["train.checkpointer.max_to_keep=9", "train.checkpointer.period=2", "train.log_period=1000"]
    status, error = run(*options, output=small_disk)
    assert status == 1 and "No space left on device" in error and "--resume" in error
    last = SafeCheckpointer(torch.nn.Module(), str(small_disk)).get_checkpoint_file()
    assert "model" in load_file(last)
    assert not list(small_disk.glob("*.tmp"))
    reached = load_file(last)["iteration"]
    ballast.unlink()
    options += ["--resume", f"train.max_iter={reached + 4}"]
    assert run(*options, output=small_disk)[0] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("room", [0, 4096])  # for nothing, or for the copy of the config alone
def test_no_room_from_the_start(run, small_disk, room):
    output = small_disk / "output"
    output.mkdir()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    status, error = run(output=output)
    (small_disk / "ballast").unlink()  # the log is written to until the end of the process
    assert status == 1 and "No space left on device" in error and "--resume" not in error


def test_no_room_for_the_results(run, small_disk, tmp_path):
    assert run("train.max_iter=1")[0] == 0
    (small_disk / "ballast").write_bytes(bytes(2 * 2**20 - 4096))
    weights = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
    status, error = run("--eval-only", weights, output=small_disk)
    (small_disk / "ballast").unlink()
    assert status == 1 and "No space left on device" in error


def test_no_room_for_the_tag(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(network(2), str(tmp_path))
    checkpointer.save("model_0000001")

    def full(path, text):
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr("ccnet_d2.checkpoint.checkpointer.atomic_write_text", full)
    with pytest.raises(DiskFullError, match=r"model_0000001\.pth, is whole"):
        checkpointer.save("model_0000003")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_quotas_and_size_limits_are_full_disks_too(tmp_path, monkeypatch, number):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3.25 * 2**20))
    with (
        pytest.raises(
            DiskFullError, match=f"failed: {os.strerror(number)} \\(3\\.2 MiB are free\\); remove something"
        ),
        atomic_file.disk_full_reported(tmp_path, lambda: "remove something"),
    ):
        raise OSError(number, os.strerror(number))
    with (
        pytest.raises(DiskFullError, match=r"; make room and try again\.$"),
        atomic_file.disk_full_reported(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), atomic_file.disk_full_reported(tmp_path):
        raise PermissionError(13, "no")
    with pytest.raises(RuntimeError, match="something"), atomic_file.disk_full_reported(tmp_path):
        raise RuntimeError("something")


def test_files_appear_whole_and_synced(tmp_path, monkeypatch):
    """Data are on the disk before the name is, and the name before anything goes on."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def told(*arguments, name=name, original=original):
            place = arguments[0] if name == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
            size = os.path.getsize(place) if Path(place).is_file() else 0
            done.append((name, Path(place).name, size))
            return original(*arguments)

        monkeypatch.setattr(os, name, told)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert done == [("fsync", "file.tmp", 3), ("replace", "file.tmp", 3), ("fsync", tmp_path.name, 0)]


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
    atomic_file.atomic_write_text(tmp_path / "file", "3 × 3 → 1\n")
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
