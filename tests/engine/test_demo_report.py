"""The demo at a few iterations: real trainings in processes of their own, report and pictures."""

import json

import cv2
import numpy as np
import pytest

from ccnet_d2.engine.comparison import Variant, train_variants
from ccnet_d2.engine.demo_report import _pixel_to_explain, run_demo
from ccnet_d2.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs_as_before")


def test_demo_writes_report_and_pictures(tmp_path, capsys):
    tiny = ["train.max_iter=3", "dataloader.train.total_batch_size=2", "train.num_pictures=0"]
    report = run_demo("synthetic", tmp_path, seed=5, overrides=tiny)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert set(report["miou"]) == {"fcn", "rcca_r1", "rcca_r2"}
    for name, miou in report["miou"].items():
        measured = json.loads((tmp_path / name / "evaluation.json").read_text())["sem_seg"]["mIoU"]
        assert miou == pytest.approx(measured, abs=0.01)
    for picture in ("predictions.png", "attention.png"):
        assert cv2.imread(str(tmp_path / picture)) is not None
    text = (tmp_path / "report.md").read_text()
    assert "| RCCA, R=2 |" in text and "model.sem_seg_head.context=rcca_r2" in text
    assert "| no attention (FCN) |" in capsys.readouterr().out


def test_wrong_override_stops_before_training(tmp_path):
    with pytest.raises(UserError, match=r"train\.max_itr"):
        run_demo("synthetic", tmp_path, overrides=["train.max_itr=3"])
    assert not (tmp_path / "fcn").exists()


def test_failed_training_is_reported_in_its_own_words(tmp_path):
    variant = Variant("bad", "bad", ("model.sem_seg_head.context=rcca_r0",))
    with pytest.raises(UserError, match=r"Training of bad failed: recurrence must be at least 1.*train\.log"):
        train_variants("toy/ccnet_synthetic.py", [variant], tmp_path)


def test_pixel_to_explain_is_where_the_second_loop_helps():
    truth = np.zeros((20, 20), np.uint8)
    truth[5:12, 3:10] = 1
    one_loop = np.zeros_like(truth)
    image, (x, y) = _pixel_to_explain([truth * 0, truth], [truth * 0, one_loop], [truth * 0, truth])
    assert (image, x, y) == (1, 6, 8)
