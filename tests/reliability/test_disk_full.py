"""A disk that is full: a clear error, and what was saved before is whole."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from ccnet_d2 import atomic_file
from ccnet_d2.atomic_file import DiskFullError
from ccnet_d2.checkpoint import SafeCheckpointer, load_checkpoint, load_file


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
