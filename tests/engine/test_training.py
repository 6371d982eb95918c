"""What a run does with its config, and the results of an evaluation as a file."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from ccnet_d2.engine import training
from ccnet_d2.engine.training import build_model, evaluate, train, write_results
from ccnet_d2.errors import UserError
from ccnet_d2.inference import MultiScaleFlip, WholeImage


def test_results_are_returned_and_written(small_run, tmp_path):
    results = train(small_run("train.max_iter=5", "train.log_period=2"))
    written = json.loads((tmp_path / "output/evaluation.json").read_text())
    assert results["sem_seg"]["mIoU"] == written["sem_seg"]["mIoU"]
    lines = (tmp_path / "output/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 3, 4, 5]
    assert json.loads(lines[-1])["sem_seg/mIoU"] == results["sem_seg"]["mIoU"]
    # With more iterations, which leave the evaluation at the end before
    train(small_run("train.max_iter=7", "train.log_period=2"), resume=True)
    more = (tmp_path / "output/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in more] == [1, 3, 4, 5, 5, 6, 7] and more[:4] == lines
    # Begun anew in the same folder, with lines of its own alone
    assert train(small_run("dataloader.evaluator=null")) is None
    (line,) = (tmp_path / "output/metrics.json").read_text().splitlines()
    assert json.loads(line)["iteration"] == 0


def test_weights_that_may_be_missing_or_of_another_shape(small_run, tmp_path):
    train(small_run("dataloader.evaluator=null"))
    weights = tmp_path / "output/model_final.pth"
    other = [
        f"train.init_checkpoint={weights}",
        "model.sem_seg_head.channels=32",
        "dataloader.evaluator=null",
    ]
    with pytest.raises(UserError, match=r"name what may differ in train\.init_may_differ"):
        train(small_run(*other))
    train(small_run(*other, "train.init_may_differ=['sem_seg_head.*']"))
    data = torch.load(weights, weights_only=True)
    model = data["model"]
    part = {"model": {key: value for key, value in model.items() if not key.startswith("backbone.conv2")}}
    torch.save(part, tmp_path / "part.pth")
    other[0] = f"train.init_checkpoint={tmp_path}/part.pth"
    with pytest.raises(UserError, match=r"backbone\.conv2"):
        train(small_run(*other))
    train(small_run(*other, "train.init_may_lack=['backbone.conv2.*']"))


def test_resuming_where_there_is_nothing_starts_with_the_first_iteration(small_run, tmp_path):
    train(small_run("train.max_iter=2", "train.log_period=1", "dataloader.evaluator=null"), resume=True)
    lines = (tmp_path / "output/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1]


def test_weights_with_code_are_taken_where_a_run_says_so(small_run, tmp_path):
    model = build_model(small_run()).state_dict()
    torch.save({"model": model, "args": argparse.Namespace(lr=0.1)}, tmp_path / "old.pth")
    run = [f"train.init_checkpoint={tmp_path}/old.pth", "dataloader.evaluator=null"]
    with pytest.raises(UserError, match=r"old\.pth"):
        train(small_run(*run))
    train(small_run(*run, "train.allow_pickle=True"))


def test_the_steps_are_as_the_run_says(small_run, monkeypatch, tmp_path):
    trainers = []
    monkeypatch.setattr(training.Trainer, "train", lambda self, *_: trainers.append(self))
    other = ["train.amp.enabled=True", "train.clip_grad_norm=0.5", "train.non_finite_retries=7"]
    for overrides in ([], other):
        train(small_run("train.non_finite_retries=0", *overrides, "dataloader.evaluator=null"))
    found = [(one.amp_dtype, one.clip_grad_norm, one.guard.retries) for one in trainers]
    assert found == [(None, None, 0), (torch.bfloat16, 0.5, 7)]


@pytest.mark.parametrize(
    ("mode", "amp", "kind", "dtype"),
    [("ms", True, MultiScaleFlip, torch.bfloat16), ("whole", False, WholeImage, torch.float32)],
)
def test_evaluations_are_in_the_test_mode_and_precision_of_the_run(
    small_run, monkeypatch, mode, amp, kind, dtype
):
    seen = []

    def inference(model, loader, evaluator):
        seen.append((type(model), (torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
        return {}

    monkeypatch.setattr(training, "inference_on_dataset", inference)
    cfg = small_run(f"test.inference={mode}", f"train.amp.enabled={amp}")
    evaluate(cfg, build_model(cfg))
    assert seen == [(kind, dtype)]


def test_pictures_of_a_set_that_is_not_there_are_told_before_the_training(small_run, tmp_path):
    overrides = ["dataloader.evaluator=null", "train.num_pictures=1", "dataloader.test.dataset.names=nothing"]
    with pytest.raises(UserError, match=r"no data set 'nothing'.*train\.num_pictures=0"):
        train(small_run(*overrides))
    assert not list((tmp_path / "output").glob("*.pth"))


def test_deterministic_operations_alone_where_a_run_asks_for_them(small_run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        train(small_run("dataloader.evaluator=null"))
        assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
        train(small_run("dataloader.evaluator=null", "train.deterministic=True"))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # as cuBLAS's documentation asks for
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_the_model_is_compiled_where_a_run_asks_for_it(small_run, monkeypatch):
    compiled = nn.Identity()
    monkeypatch.setattr(training, "compile_model", lambda model, *, dynamic: compiled)
    assert build_model(small_run("train.compile=True")) is compiled
    assert build_model(small_run("train.compile=False")) is not compiled


def test_test_images_are_read_by_forked_workers(small_run, monkeypatch):
    forked = []
    monkeypatch.setattr(training, "fork_workers", lambda loader: forked.append(loader) or loader)
    train(small_run("dataloader.test.num_workers=1"))
    assert [loader.num_workers for loader in forked] == [1]


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
