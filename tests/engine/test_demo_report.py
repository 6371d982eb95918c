"""The demo at a few iterations: real trainings in processes of their own, report and pictures."""

import functools
import json
import re

import cv2
import numpy as np
import pytest

from ccnet_d2.data import register_all
from ccnet_d2.engine import demo_report
from ccnet_d2.engine.comparison import Variant, VariantRun, train_variants
from ccnet_d2.engine.demo_report import _most_telling, _pixels_to_explain, run_demo
from ccnet_d2.errors import UserError
from ccnet_d2.inference import AttentionMaps

pytestmark = pytest.mark.usefixtures("catalogs_as_before")


def test_demo_writes_report_and_pictures(tmp_path, capsys):
    tiny = ["train.max_iter=3", "dataloader.train.total_batch_size=2", "train.num_pictures=0"]
    tiny.append("dataloader.test.dataset.names=[ccnet_synthetic_val]")  # as a list, of which runs take one
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


@pytest.fixture
def trainings(monkeypatch):
    """Takes the trainings' place: notes what they are given, and makes up what they reach."""
    given = {}

    def train(config_file, variants, output, *, overrides, environment):
        given.update(config_file=config_file, overrides=list(overrides), environment=environment)
        runs = []
        for place, variant in enumerate(variants, 1):
            metrics = {"sem_seg": {"mIoU": 10.128 * place, "pACC": 20.256 * place}}
            runs.append(VariantRun(variant, output / variant.name, [variant.name], 40.06 * place, metrics))
        return runs

    monkeypatch.setattr(demo_report, "train_variants", train)
    monkeypatch.setattr(demo_report, "_draw", lambda *_: None)
    few = functools.partial(demo_report.SyntheticConfig, train_images=3, val_images=2)
    monkeypatch.setattr(demo_report, "SyntheticConfig", few)
    return given


def test_the_trainings_get_the_seed_and_the_demo_s_own_data(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(demo_report, "has_fast_bf16", lambda: True)
    run_demo("synthetic", tmp_path, seed=5, overrides=["train.max_iter=7"])
    assert trainings["config_file"] == "toy/ccnet_synthetic.py"
    # The user's come last, and count.
    assert trainings["overrides"] == ["train.seed=5", "train.max_iter=7"]
    (variable, folder), *others = trainings["environment"].items()
    assert (variable, folder, others) == ("DETECTRON2_DATASETS", str(tmp_path / "datasets"), [])
    first = cv2.imread(f"{folder}/ccnet_synthetic/images/train/train_00000.png")
    run_demo("synthetic", tmp_path / "other", seed=6)
    other = cv2.imread(str(tmp_path / "other/datasets/ccnet_synthetic/images/train/train_00000.png"))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fast", [False, True])
def test_real_images_are_trained_in_half_precision_where_it_is_fast(tmp_path, trainings, monkeypatch, fast):
    for folder, channels in (("train", 3), ("trainannot", 1), ("val", 3), ("valannot", 1)):
        (tmp_path / "sets/camvid" / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "sets/camvid" / folder / "a.png"), np.zeros((8, 8, channels), np.uint8))
    register_all(tmp_path / "sets")
    monkeypatch.setattr(demo_report, "has_fast_bf16", lambda: fast)
    run_demo("camvid", tmp_path / "out")
    assert trainings["config_file"] == "camvid/ccnet_R_18_D8_half.py"
    assert trainings["overrides"] == ["train.seed=0", *["train.amp.enabled=True"] * fast]
    assert trainings["environment"] == {}
    assert not (tmp_path / "out/datasets").exists()
    # The user's come last, and count.
    run_demo("camvid", tmp_path / "out", overrides=["train.amp.enabled=False"])
    assert trainings["overrides"][-1] == "train.amp.enabled=False"


def test_numbers_of_the_report_are_those_of_the_trainings(tmp_path, trainings):
    report = run_demo("synthetic", tmp_path, seed=5, overrides=["train.max_iter=7"])
    # In the order of the paper's table, which is not that of the trainings.
    assert list(report["miou"].items()) == [("fcn", 30.38), ("rcca_r1", 20.26), ("rcca_r2", 10.13)]
    assert report["pixel_accuracy"] == {"fcn": 60.77, "rcca_r1": 40.51, "rcca_r2": 20.26}
    assert report["train_seconds"] == {"fcn": 120.2, "rcca_r1": 80.1, "rcca_r2": 40.1}
    assert (report["dataset"], report["seed"], report["iterations"]) == ("synthetic", 5, 7)
    text = (tmp_path / "report.md").read_text()
    rows = [
        "no attention (FCN) | 30.4 | 60.8 | 120",
        "RCCA, R=1 | 20.3 | 40.5 | 80",
        "RCCA, R=2 | 10.1 | 20.3 | 40",
    ]
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == [f"| {row} |" for row in rows]
    assert "7 iterations each with seed 5; measured on the 2 images of" in text


def test_a_demo_that_fails_leaves_no_report_of_an_earlier_one(tmp_path, trainings, monkeypatch):
    run_demo("synthetic", tmp_path)
    report = [tmp_path / name for name in ("report.json", "report.md", "predictions.png", "attention.png")]
    assert report[0].exists() and report[1].exists()
    for picture in report[2:]:
        picture.touch()

    def fail(*_, **__):
        raise UserError("a training failed")

    monkeypatch.setattr(demo_report, "train_variants", fail)
    with pytest.raises(UserError, match="a training failed"):
        run_demo("synthetic", tmp_path)
    assert not any(file.exists() for file in report)


def test_wrong_override_stops_before_training(tmp_path):
    (tmp_path / "report.json").touch()
    with pytest.raises(UserError, match=r"train\.max_itr"):
        run_demo("synthetic", tmp_path, overrides=["train.max_itr=3"])
    assert not (tmp_path / "fcn").exists()
    assert (tmp_path / "report.json").exists(), "for a slip of the pen"


@pytest.mark.parametrize("split", ["train", "test"])
def test_unknown_data_set_stops_before_training(tmp_path, trainings, split):
    with pytest.raises(UserError, match=r"^There is no data set 'ccnet_synthetic_vall'; did you mean"):
        run_demo(
            "synthetic", tmp_path, overrides=[f"dataloader.{split}.dataset.names=[ccnet_synthetic_vall]"]
        )
    assert not trainings


@pytest.mark.parametrize(
    ("override", "setter"),
    [
        ("train.seed=7", "--seed sets train.seed"),
        ("+train.seed=7", "--seed sets train.seed"),
        ("train.output_dir=x", "--output sets train.output_dir"),
        ("model.sem_seg_head.context=psp", "the demo sets model.sem_seg_head.context"),
    ],
)
def test_what_would_be_overridden_is_refused(tmp_path, trainings, override, setter):
    """A seed was trained with, and the report said another one; the others had no effect."""
    with pytest.raises(
        UserError, match=f"^Override {re.escape(repr(override))} has no effect, as {setter} for each"
    ):
        run_demo("synthetic", tmp_path / "out", overrides=["train.max_iter=7", override])
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to output={tmp_path}/file/demo: Not a directory"):
        run_demo("synthetic", tmp_path / "file" / "demo")


def test_failed_training_is_reported_in_its_own_words(tmp_path):
    variant = Variant("bad", "bad", ("model.sem_seg_head.context=rcca_r0",))
    message = r"Training of bad failed: model\.sem_seg_head cannot be built: recurrence must be at least 1.*train\.log"
    with pytest.raises(UserError, match=message):
        train_variants("toy/ccnet_synthetic.py", [variant], tmp_path)


def test_pixels_to_explain_are_where_the_second_loop_helps():
    truth = np.zeros((20, 20), np.uint8)
    truth[5:12, 3:10] = 1
    none = np.zeros_like(truth)
    one_loop, two_loops = [none, none, truth.T * 0], [none, truth, truth.T]
    assert _pixels_to_explain([none, truth, truth.T], one_loop, two_loops) == [(1, (6, 8)), (2, (8, 6))]


def test_pixels_to_explain_where_one_loop_is_right_everywhere_are_within_what_two_get_right():
    truth = np.zeros((20, 20), np.uint8)
    two_loops = np.ones_like(truth)
    two_loops[10:17, 2:9] = 0
    assert _pixels_to_explain([truth] * 2, [truth] * 2, [two_loops, truth + 1]) == [(0, (5, 13))]


def test_pixels_to_explain_where_two_loops_are_right_nowhere_are_in_the_middle():
    truth = np.zeros((21, 21), np.uint8)
    assert _pixels_to_explain([truth], [truth], [truth + 1]) == [(0, (10, 10))]


def test_the_pixel_that_ends_at_one_place_tells_most():
    image, even = np.zeros((8, 8, 3), np.uint8), np.full((2, 2), 0.25, np.float32)
    focused = np.array([[0.9, 0.1], [0, 0]], np.float32)
    looks = [
        AttentionMaps(image, (0, 0), (0, 0), maps, (2.0, 2.0)) for maps in ([focused, even], [even, focused])
    ]
    assert _most_telling(looks) is looks[1]
