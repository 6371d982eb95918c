"""The results of an evaluation as a file."""

import json

import numpy as np
import pytest
import torch

from ccnet_d2.engine.training import write_results


@pytest.mark.parametrize("make", [float, np.float64, np.float32, torch.tensor])
def test_results_of_any_kind_of_number_are_written(tmp_path, make):
    """Detectron2 takes whatever is a number from an evaluator of one's own."""
    results = {"sem_seg": {"mIoU": make(50.5), "IoU-a": make(float("nan")), "IoU-b": make(-float("inf"))}}
    path = tmp_path / "new" / "evaluation.json"
    write_results(path, {**results, "count": {"images": 3, "name": "x"}})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "sem_seg": {"mIoU": 50.5, "IoU-a": None, "IoU-b": None},
        "count": {"images": 3, "name": "x"},
    }
    assert text.startswith('{\n  "sem_seg": {\n    "mIoU": 50.5') and text.endswith("}\n")
