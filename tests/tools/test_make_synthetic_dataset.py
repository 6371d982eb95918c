"""The script that writes the synthetic set."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tools/make_synthetic_dataset.py")


def test_parameters_reach_the_files(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "deep" / "set"
    arguments = [
        "--root",
        str(root),
        "--train-images",
        "5",
        "--val-images",
        "3",
        "--width",
        "64",
        "--noise",
        "3.5",
    ]
    assert script.main(arguments) == 0
    assert "Wrote 5 training and 3 validation images of 64x48, 4 classes" in capsys.readouterr().out
    config = json.loads((root / "manifest.json").read_text())["config"]
    assert (config["width"], config["height"], config["noise"], config["train_images"]) == (64, 48, 3.5, 5)
    assert len(list((root / "images" / "train").iterdir())) == 5
    assert script.main(arguments) == 0
    assert "Already there" in capsys.readouterr().out


def test_bad_parameters_are_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--root", str(tmp_path / "set"), "--num-kinds", "9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Synthetic data set: num_kinds is 9") and error.count("\n") == 1
    assert not (tmp_path / "set").exists()
    (tmp_path / "file").write_text("mine")
    assert script.main(["--root", str(tmp_path)]) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_looked_into_is_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name is too long for any file system; one in a folder without rights ends alike."""
    root = tmp_path / ("x" * 300)
    assert script.main(["--root", str(root)]) == 1
    assert capsys.readouterr().err == (
        f"error: Cannot write the synthetic data set to '{root}': File name too long.\n"
    )
