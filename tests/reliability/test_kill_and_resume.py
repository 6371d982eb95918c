"""The script that kills and resumes, on a few kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import differences, latest_is_loadable

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.slow
def test_nothing_is_lost():
    run = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "6", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    table = {
        line.rsplit(maxsplit=4)[0].strip(): line.split()[-4:] for line in run.stdout.splitlines() if line
    }
    kills, in_save, resumed, unloadable = map(int, table["all"])
    assert kills == resumed == 6 and in_save >= 2 and unloadable == 0


def test_the_comparison_sees_a_bit():
    a = {"x": [torch.tensor([1.0, 2.0]), {"y": 3}], "z": "text"}
    b = {"x": [torch.tensor([1.0, 2.0]), {"y": 3}], "z": "text"}
    assert differences(a, b) == []
    b["x"][0][1] = torch.nextafter(b["x"][0][1], torch.tensor(3.0))
    assert differences(a, b) == [".x.0"]
    b["x"][1]["y"] = 3.0
    assert differences(a, b) == [".x.0", ".x.1.y"]
    assert differences({"a": 1}, {"b": 1}) == [""] and differences([1], [1, 2], "w") == ["w"]


def test_the_check_of_the_latest_checkpoint_sees_damage(tmp_path):
    assert latest_is_loadable(tmp_path) == ""
    torch.save({"model": torch.zeros(99)}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert latest_is_loadable(tmp_path) == ""
    path = tmp_path / "model_0000001.pth"
    path.write_bytes(path.read_bytes()[:-9])
    assert "model_0000001.pth" in latest_is_loadable(tmp_path)
    path.unlink()
    assert "does not exist" in latest_is_loadable(tmp_path)
