"""train_net.py from the command line: train, evaluate, resume, and every kind of wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ccnet_d2.data import (
    SyntheticConfig,
    generate_synthetic_dataset,
    register_all,
    register_sem_seg_folder,
)
from ccnet_d2.engine.command_line import main

CONFIG = "toy/ccnet_synthetic.py"
TRAIN_NET = Path(__file__).parents[2] / "projects/CCNet/train_net.py"


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A synthetic set of eight images, registered; its folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = tmp_path / "ccnet_synthetic"
    generate_synthetic_dataset(root, SyntheticConfig(train_images=8, val_images=4))
    register_all(tmp_path)
    yield root
    monkeypatch.undo()
    register_all()


@pytest.fixture
def train_net(dataset, tmp_path, capsys):
    """Runs train_net.py in this process; gives its status and the last line on stderr."""

    def run(*arguments, config=CONFIG, output="output"):
        options = [
            f"train.output_dir={tmp_path / output}",
            "train.max_iter=4",
            "train.device=cpu",
            "train.seed=0",
            "train.num_pictures=2",
            "dataloader.train.total_batch_size=2",
        ]
        flags = [a for a in arguments if a.startswith("--")]
        overrides = [a for a in arguments if not a.startswith("--")]
        status = main(["--config-file", config, *flags, *options, *overrides])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return status, errors[-1] if errors else ""

    return run


def test_train_evaluate_resume(train_net, tmp_path):
    output = tmp_path / "output"
    assert train_net()[0] == 0
    for name in ("model_final.pth", "last_checkpoint", "config.yaml", "metrics.json", "log.txt"):
        assert (output / name).is_file(), name
    assert list((output / "pictures").glob("*.png")) and list(output.glob("events.out.tfevents.*"))
    trained = json.loads((output / "evaluation.json").read_text())

    status, _ = train_net(
        "--eval-only", f"train.init_checkpoint={output / 'model_final.pth'}", output="again"
    )
    assert status == 0
    assert json.loads((tmp_path / "again/evaluation.json").read_text()) == trained

    assert train_net("--resume", "train.max_iter=6")[0] == 0
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 5
    status, error = train_net("--resume", "train.max_iter=6")
    assert status == 1 and "Nothing to train" in error


def remove_class_3(dataset):
    for path in (dataset / "labels/val").iterdir():
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(label == 3, 255, label).astype(np.uint8))


def test_results_are_json_also_where_a_class_does_not_occur(train_net, dataset, tmp_path):
    """NaN, as Python writes it, is refused by JavaScript, jq and others."""
    remove_class_3(dataset)
    assert train_net()[0] == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "output/metrics.json").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    text = (tmp_path / "output/evaluation.json").read_text()
    scores = json.loads(text, parse_constant=refuse)["sem_seg"]
    assert [name for name, value in scores.items() if value is None] == ["IoU-object B", "ACC-object B"]
    assert scores["mIoU"] == pytest.approx(
        np.mean([v for k, v in scores.items() if k[:4] == "IoU-" and v is not None])
    )
    # It counts as evaluated.
    status, error = train_net("--resume")
    assert status == 1 and "Nothing to train" in error


def test_label_maps_that_are_void_throughout_are_told(train_net, dataset, tmp_path):
    for path in (dataset / "labels/train").iterdir():
        cv2.imwrite(str(path), np.full((48, 48), 255, np.uint8))
    assert train_net("train.max_iter=11", "dataloader.evaluator=null", "train.num_pictures=0")[0] == 0
    assert (tmp_path / "output/log.txt").read_text().count("The first 10 batches have no labelled pixel") == 1


def test_test_classes_of_other_names_are_told_once_in_a_run(train_net, dataset, tmp_path, catalogs_as_before):
    folders = (dataset / kind / "val" for kind in ("images", "labels"))
    register_sem_seg_folder("other_names", *folders, classes=["background", "ring", "B", "A"])
    other = "dataloader.test.dataset.names=other_names"
    log, told = "log.txt", "in the test set 'other_names': the evaluation takes"
    assert train_net(other, "train.eval_period=1")[0] == 0
    assert (tmp_path / "output" / log).read_text().count(told) == 1
    weights = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
    assert train_net("--eval-only", weights, other, output="again")[0] == 0
    assert (tmp_path / "again" / log).read_text().count(told) == 1


def test_same_seed_same_weights(train_net, tmp_path):
    for output in ("a", "b"):
        assert train_net(output=output)[0] == 0
    a, b = (torch.load(tmp_path / x / "model_final.pth", weights_only=True)["model"] for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_bf16_autocast_on_cpu(train_net):
    assert train_net("train.amp.enabled=True")[0] == 0
    status, error = train_net("train.amp.enabled=True", "train.amp.dtype=float16")
    assert status == 1 and "float16 does not run on a CPU" in error


def first(dataset, kind):
    return sorted((dataset / kind / "train").iterdir())[0]


def damage_nothing(dataset):
    pass


def remove_dataset(dataset):
    dataset.rename(dataset.with_name("elsewhere"))


def label_out_of_range(dataset):
    for path in (dataset / "labels/train").iterdir():
        cv2.imwrite(str(path), np.full((48, 48), 77, np.uint8))


def validation_label_out_of_range(dataset):
    for path in (dataset / "labels/val").iterdir():
        cv2.imwrite(str(path), np.full((48, 48), 5, np.uint8))


def label_of_other_size(dataset):
    for path in (dataset / "labels/train").iterdir():
        cv2.imwrite(str(path), np.zeros((40, 48), np.uint8))


def truncate_images(dataset):
    for path in (dataset / "images/train").iterdir():
        path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (remove_dataset, [], ["ccnet_synthetic"]),
        (label_out_of_range, [], ["labels/train", "77"]),
        (validation_label_out_of_range, [], ["labels/val", "value 5"]),
        (damage_nothing, ["model.sem_seg_head.num_classes=6"], ["num_classes is 6", "has 4 classes"]),
        (damage_nothing, ["model.sem_seg_head.num_classes=3"], ["num_classes is 3", "has 4 classes"]),
        (
            damage_nothing,
            ["model.input_format=BGR"],
            ["input_format is 'BGR'", "train.mapper.image_format is 'RGB'"],
        ),
        (label_of_other_size, [], ["labels/train", "48x40", "48x48"]),
        (truncate_images, [], ["images/train"]),
        (truncate_images, ["dataloader.train.num_workers=1"], ["images/train"]),
        (damage_nothing, ["train.max_itr=3"], ["train.max_itr", "max_iter"]),
        (damage_nothing, ["model.sem_seg_head.context=rcca_r0"], ["recurrence", "0"]),
        (damage_nothing, ["model.sem_seg_head.channels=20"], ["channels=20", "8"]),
        (damage_nothing, ["model.sem_seg_head.context=rca"], ["rca"]),
        (damage_nothing, ["train.max_iter=0"], ["train.max_iter=0", "1 or more"]),
        (damage_nothing, ["train.max_iter=1e1"], ["train.max_iter=10.0", "whole number"]),
        (damage_nothing, ["train.log_period=0"], ["train.log_period=0", "1 or more"]),
        (damage_nothing, ["train.eval_period=-1"], ["train.eval_period=-1", "0 or more"]),
        (damage_nothing, ["train.num_pictures=-1"], ["train.num_pictures=-1", "0 or more"]),
        (
            damage_nothing,
            ["dataloader.test.num_workers=2.5"],
            ["dataloader.test.num_workers=2.5", "0 or more"],
        ),
        (
            damage_nothing,
            ["dataloader.train.num_workers=-1"],
            ["dataloader.train.num_workers=-1", "0 or more"],
        ),
        (
            damage_nothing,
            ["dataloader.train.total_batch_size=x"],
            ["dataloader.train.total_batch_size=x", "whole number, 1 or more"],
        ),
        (damage_nothing, ["optimizer.lr=abc"], ["optimizer.lr='abc'", "a number, such as 0.002"]),
        (damage_nothing, ["optimizer.lr=null"], ["optimizer.lr=null", "a number, such as 0.002"]),
        (damage_nothing, ["train.seed=1.5"], ["train.seed=1.5", "whole number"]),
        (damage_nothing, ["train.clip_grad_norm=-1"], ["train.clip_grad_norm=-1", "null"]),
        (damage_nothing, ["train.clip_grad_norm=0"], ["train.clip_grad_norm=0", "null"]),
        (damage_nothing, ["train.clip_grad_norm=abc"], ["train.clip_grad_norm=abc", "a number above 0"]),
        (damage_nothing, ["train.clip_grad_norm=true"], ["train.clip_grad_norm=True", "a number above 0"]),
        (damage_nothing, ["train.max_iter=true"], ["train.max_iter=True", "whole number"]),
        (damage_nothing, ["--eval-only"], ["train.init_checkpoint"]),
        (damage_nothing, ["train.output_dir=''"], ["train.output_dir=''", "no folder"]),
        (damage_nothing, ["train.output_dir=null"], ["train.output_dir=None", "no folder"]),
        (damage_nothing, ["train.output_dir=5"], ["train.output_dir=5", "no folder"]),
        (damage_nothing, ["train.output_dir=/dev/null"], ["train.output_dir=/dev/null", "File exists"]),
        (damage_nothing, ["train.output_dir=/proc"], ["cannot write to train.output_dir=/proc:"]),
        (
            damage_nothing,
            ["train.output_dir=/dev/null/x"],
            ["train.output_dir=/dev/null/x", "Not a directory"],
        ),
        (damage_nothing, ["train.init_checkpoint=/nowhere/x.pth"], ["/nowhere/x.pth"]),
    ],
)
def test_wrong_input_is_one_sentence(train_net, dataset, damage, arguments, words):
    damage(dataset)
    status, error = train_net(*arguments)
    assert status == 1
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_evaluation_of_channels_in_another_order(train_net, tmp_path):
    assert train_net()[0] == 0
    checkpoint = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
    status, error = train_net(
        "--eval-only", checkpoint, "dataloader.test.mapper.image_format=BGR", output="x"
    )
    assert status == 1
    assert "model.input_format is 'RGB', but dataloader.test.mapper.image_format is 'BGR'" in error


def test_unknown_test_mode_is_told_before_training(train_net, tmp_path):
    status, error = train_net("test.inference=slidd")
    assert status == 1 and "unknown test mode 'slidd'" in error
    assert not list((tmp_path / "output").glob("*.pth"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataloader.test.dataset.names=ccnet_synthetic_vall", ["did you mean 'ccnet_synthetic_val'"]),
        ("dataloader.test.dataset.names=camvid_sem_seg_val", ["camvid/val' does not exist"]),
        ("dataloader.evaluator.dataset_name=nothing", ["'nothing'"]),
        ("dataloader.test.mapper.is_train=True", ["SemSegMapper needs dataset_names"]),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_training(train_net, tmp_path, override, words):
    """It came at the first evaluation, after thousands of steps, and where there were pictures as a traceback."""
    status, error = train_net(override)
    assert status == 1 and all(word in error for word in words), error
    assert not list((tmp_path / "output").glob("*.pth")) and not (tmp_path / "output/metrics.json").exists()


def test_training_without_an_evaluation(train_net, tmp_path):
    missing = "dataloader.test.dataset.names=camvid_sem_seg_val"
    status, error = train_net(missing)
    advice = "dataloader.evaluator=null train.num_pictures=0"
    assert status == 1 and error.endswith(f"To train without an evaluation: {advice}.")
    assert train_net(missing, *advice.split()) == (0, "")
    assert (tmp_path / "output/model_final.pth").is_file()
    assert not (tmp_path / "output/evaluation.json").exists()
    status, error = train_net("--eval-only", "dataloader.evaluator=null")
    assert status == 1 and "no dataloader.evaluator" in error


def test_unknown_config(train_net):
    status, error = train_net(config="toy/ccnet_sinthetic.py")
    assert status == 1 and "toy/ccnet_synthetic.py" in error


def test_checkpoint_of_another_model(train_net, tmp_path):
    assert train_net()[0] == 0
    checkpoint = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
    status, error = train_net("--eval-only", checkpoint, "model.sem_seg_head.num_classes=5", output="x")
    assert status == 1 and "shape" in error
    status, error = train_net("--eval-only", checkpoint, "model.sem_seg_head.context=hv", output="x")
    assert status == 1 and "lacks" in error


def test_script_exits_non_zero_without_traceback():
    run = subprocess.run(
        [sys.executable, TRAIN_NET, "--config-file", "nothing.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: There is no config 'nothing.py'")
    assert "Traceback" not in run.stderr
