"""Helpers for tests of what happens when something goes wrong."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset, register_all
from ccnet_d2.engine.command_line import main

sys.path.insert(0, str(Path(__file__).parent))  # the scripts there are tested too

SMALL_RUN = Path(__file__).with_name("small_run.py")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A synthetic set of ten images, registered; its folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = tmp_path / "ccnet_synthetic"
    generate_synthetic_dataset(root, SyntheticConfig(train_images=10, val_images=2))
    register_all(tmp_path)
    yield root
    torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    register_all()


@pytest.fixture
def run(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Function that runs train_net.py on the small run; gives its status and the error that it printed."""

    def run_it(*arguments: str, output: str | Path = "output") -> tuple[int, str]:
        flags = [a for a in arguments if a.startswith("--")]
        overrides = [a for a in arguments if not a.startswith("--")]
        folder = f"train.output_dir={tmp_path / output}"
        status = main(["--config-file", str(SMALL_RUN), *flags, folder, *overrides])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return status, errors[-1] if errors else ""

    return run_it
