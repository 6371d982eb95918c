"""analyze_model.py: a run's parameters, FLOPs, memory and time, and the tables' files."""

import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ccnet_d2.analysis import run
from ccnet_d2.analysis.run import analyze_run, image_size_of
from ccnet_d2.analysis.untrained import random_images
from ccnet_d2.engine import load_run
from ccnet_d2.errors import UserError
from ccnet_d2.instantiation import build_object
from tests.scripts import PROJECT, load_script

SCRIPT = PROJECT / "tools/analyze_model.py"
TOY = "toy/ccnet_synthetic.py"


@pytest.fixture(scope="module")
def script():
    return load_script("tools/analyze_model.py")


def analyze(script, tmp_path, *arguments) -> dict:
    assert script.main([*arguments, "--json", str(tmp_path / "new/result.json")]) == 0
    return json.loads((tmp_path / "new/result.json").read_text())


def test_a_small_run(script, tmp_path, capsys):
    result = analyze(
        script,
        tmp_path,
        "--config-file",
        TOY,
        "--image-size=40x48",
        "--batch-size=2",
        "--training-step",
        "train.device=cpu",
        "model.sem_seg_head.context=rcca_r1",
    )
    modules = result["modules"]
    # Two 3x3 convolutions, the second of stride 2; conva, RCCA, convb, fuse and classifier at half the size.
    full, half = 2 * 40 * 48, 2 * 20 * 24
    macs = {
        "backbone": full * 9 * 3 * 64 + half * 9 * 64 * 64,
        "sem_seg_head.conva": half * 9 * 64 * 64,
        "sem_seg_head.fuse": half * 9 * 128 * 64,
        "sem_seg_head.classifier": half * 64 * 4,
        "sem_seg_head.context": half * (64 * (64 + 16) + (20 + 24) * (64 + 8)),
    }
    for name, count in macs.items():
        assert modules[name]["gflops"] == pytest.approx(2 * count / 1e9, rel=0.03), name
    head = sum(modules[n]["gflops"] for n in modules if n.startswith("sem_seg_head."))
    assert modules["sem_seg_head"]["gflops"] == pytest.approx(head)
    assert modules["total"]["gflops"] == pytest.approx(head + modules["backbone"]["gflops"])
    parameters = modules["backbone"]["parameters"]
    assert parameters == 9 * 3 * 64 + 9 * 64 * 64 + 2 * 2 * 64
    assert modules["total"]["parameters"] == parameters + modules["sem_seg_head"]["parameters"]
    weights = build_object(load_run(TOY, ["model.sem_seg_head.context=rcca_r1"]), "model").state_dict()
    buffers = [torch.tensor(0.0)] * 6  # the image's mean and deviation, which checkpoints leave out
    held = sum(tensor.nbytes for tensor in (*weights.values(), *buffers))
    assert result["weights_mb"] == pytest.approx(held / 1e6, abs=1e-9)
    # Parts that hold nothing are left out, and so are those of the backbone.
    assert modules.keys() == {"backbone", "sem_seg_head", "total"} | {
        f"sem_seg_head.{part}" for part in ("conva", "context", "convb", "fuse", "classifier")
    }

    # The first convolution's result alone, and all results of the head's convolutions.
    assert result["inference_peak_mb"] > 4e-6 * full * 64
    assert result["training_peak_mb"] > result["training_kept_mb"] > 4e-6 * (2 * full + 5 * half) * 64
    assert result["inference_seconds"] > 0 and "CPU" in result["device"]
    printed = capsys.readouterr().out
    assert (
        "toy/ccnet_synthetic.py: 2 x 3 x 40 x 48" in printed and "two FLOPs for each multiply-add" in printed
    )


def test_larger_images_cost_more_and_modules_are_interchangeable(script, tmp_path):
    base = ("--config-file", TOY, "--no-time")
    small = analyze(script, tmp_path, *base, "--image-size=32")
    large = analyze(script, tmp_path, *base, "--image-size=64")
    nl = analyze(script, tmp_path, *base, "--image-size=64", "model.sem_seg_head.context=nl")
    assert "inference_seconds" not in small and small["conventions"].keys() == {"gflops", "inference_peak_mb"}
    assert large["modules"]["backbone"]["gflops"] == pytest.approx(4 * small["modules"]["backbone"]["gflops"])
    assert large["inference_peak_mb"] > 3 * small["inference_peak_mb"]
    assert (
        nl["modules"]["sem_seg_head.context"]["gflops"] > large["modules"]["sem_seg_head.context"]["gflops"]
    )
    assert nl["modules"]["backbone"] == large["modules"]["backbone"]


def test_the_paper_s_network_without_computing_it(script, tmp_path, capsys):
    result = analyze(
        script, tmp_path, "--config-file", "cityscapes/ccnet_R_101_D8_769x769_60k.py", "--no-time"
    )
    assert result["image_size"] == [769, 769]  # the run's crop
    assert result["modules"]["sem_seg_head.context"]["gflops"] == pytest.approx(16.5, rel=0.015)
    assert result["modules"]["sem_seg_head.auxiliary"]["gflops"] == 0  # trains, but does not predict
    assert "context" in capsys.readouterr().out


def test_a_run_on_clips_is_measured_on_its_clips(script, tmp_path, capsys):
    run = "camvid/ccnet3d_{}_R_18_D8_half.py"
    measure = ("--no-time", "--training-step", "--image-size=32x40", "train.device=cpu")
    clips = analyze(script, tmp_path, "--config-file", run.format("T5"), *measure)
    assert "T5_R_18_D8_half.py: 1 x 5 x 3 x 32 x 40" in capsys.readouterr().out
    single = analyze(script, tmp_path, "--config-file", run.format("T1"), *measure)
    assert (clips["frames"], single["frames"]) == (5, 1)
    gflops = {n: (clips["modules"][n]["gflops"], single["modules"][n]["gflops"]) for n in clips["modules"]}
    for name in ("backbone", "sem_seg_head.conva"):
        assert gflops[name][0] == pytest.approx(5 * gflops[name][1]), name
    # Three loops at stride 8 over 4x5 positions of each frame: projections, and energies and sums of T + H + W keys.
    for frames, found in zip((5, 1), gflops["sem_seg_head.context"], strict=True):
        keys = (frames if frames > 1 else 0) + 4 + 5
        loops = 3 * frames * 4 * 5 * (128 * (128 + 32) + keys * (128 + 16))
        assert found == pytest.approx(2 * loops / 1e9, rel=0.05)
    assert clips["training_kept_mb"] > 4 * single["training_kept_mb"]
    # At the end of the backward pass there is a gradient for each parameter, here far more than the activations.
    assert single["training_peak_mb"] > 4e-6 * single["modules"]["total"]["parameters"]


def test_a_detection_run(script, tmp_path):
    """Its shapes depend on what it sees, so it is not traced but run."""
    run = ("--config-file", "quick_schedules/mask_rcnn_rcca_R_18_FPN_overfit.py", "--image-size=64")
    result = analyze(script, tmp_path, *run, "train.device=cpu")
    modules = result["modules"]
    assert modules["total"]["gflops"] > modules["backbone"]["gflops"] > 0
    assert modules["roi_heads"]["parameters"] > 0 and result["inference_seconds"] > 0


@pytest.mark.parametrize(
    ("crops", "size"),
    [
        ([{"crop_size": 96}], (96, 96)),
        ([{"prob": 0.5}, {"crop_size": [64, 80]}, {"crop_size": 96}], (64, 80)),
        ([{"crop_type": "absolute", "crop_size": [64, 80]}], (64, 80)),
        # Shares of the image and ranges, which are no size.
        ([{"crop_type": "relative_range", "crop_size": [0.9, 0.9]}], None),
        ([{"crop_type": "relative", "crop_size": [1, 1]}, {"crop_size": 96}], (96, 96)),
        ([{"crop_type": "absolute_range", "crop_size": [384, 600]}], None),
        ([], None),
    ],
)
def test_the_crop_is_the_size_unless_it_depends_on_the_image(crops, size):
    cfg = OmegaConf.create({"dataloader": {"train": {"mapper": {"augmentations": crops}}}})
    if size is None:
        with pytest.raises(UserError, match="any size: give --image-size"):
            image_size_of(cfg)
    else:
        assert image_size_of(cfg) == size


def test_training_step_of_another_model(tmp_path):
    cfg = OmegaConf.create({"model": {"backbone": {}}, "train": {"device": "cpu"}})
    with pytest.raises(UserError, match="A training step needs labels"):
        analyze_run(cfg, (64, 64), training_step=True)


def test_labels_are_of_all_kinds_that_the_heads_take():
    heads = {"roi_heads": {"num_classes": 3}, "sem_seg_head": {"num_classes": 5}}
    images = random_images((32, 40), 1)
    for names in (["roi_heads"], ["sem_seg_head"], ["roi_heads", "sem_seg_head"]):
        cfg = OmegaConf.create({"model": {name: heads[name] for name in names}})
        (labelled,) = run._labelled(cfg, images)
        assert ("instances" in labelled, "sem_seg" in labelled) == (
            "roi_heads" in names,
            "sem_seg_head" in names,
        )


def test_what_is_printed_is_what_was_measured():
    result = {
        "image_size": [40, 48],
        "batch_size": 2,
        "modules": {"total": {"parameters": 1_230_000, "gflops": 45.678}},
        "weights_mb": 11.0,
        "inference_peak_mb": 12.0,
        "training_kept_mb": 13.0,
        "training_peak_mb": 14.0,
        "inference_seconds": 0.0156,
        "device": "CPU, 1 thread",
        "conventions": {"gflops": "a number"},
    }
    assert run.format_run("a/run.py", result).splitlines() == [
        "a/run.py: 2 x 3 x 40 x 48",
        "",
        "       parameters (M)  GFLOPs",
        "total            1.23   45.68",
        "",
        "memory (MB): weights 11, inference 12, training step 14 (of it kept for the backward pass 13)",
        "time: 0.016 s (CPU, 1 thread)",
        "",
        "gflops: a number.",
    ]


@pytest.mark.parametrize(("threads", "words"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_the_cpu_is_told_with_its_threads(monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert run._describe(torch.device("cpu")) == words


def test_table_as_a_file(script, tmp_path, capsys):
    table = analyze(script, tmp_path, "--table", "ccnet")
    gflops = {row["method"]: row["gflops"] for row in table["rows"]}
    assert gflops["RCCA (R=2)"] == pytest.approx(16.5, rel=0.015)
    assert "RCCA (R=2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", TOY], "error: The run trains on images of any size: give --image-size"),
        (["--config-file", "toy/ccnet_synthetik.py"], "error: There is no config"),
        (["--config-file", TOY, "--image-size=64", "model.nothing=1"], "error: Unknown key 'model.nothing'"),
    ],
)
def test_wrong_input_is_one_sentence(script, arguments, message, capsys):
    assert script.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--table", "ccnet", "--config-file", TOY],
        ["--table", "ccnet", "--image-size=64"],
        ["--table", "ccnet", "--batch-size=2"],
        ["--config-file", TOY, "--image-size=64x"],
        ["--config-file", TOY, "--batch-size=0"],
    ],
)
def test_impossible_requests_show_the_usage(script, arguments, capsys):
    with pytest.raises(SystemExit) as exit_status:
        script.main(arguments)
    assert exit_status.value.code == 2 and "usage" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_sentence(script, tmp_path, capsys):
    run = ("--config-file", TOY, "--image-size=16", "--no-time")
    assert script.main([*run, "--json", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.err == f"error: cannot write '{tmp_path}': Is a directory.\n" and "total" in output.out


def test_help_from_the_command_line():
    run = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--table" in run.stdout and run.stderr == ""


def test_a_detector_is_busy_without_training(script, tmp_path):
    """The quick schedule's Mask R-CNN: as many masks as it can find, and what a training step takes."""
    result = analyze(
        script,
        tmp_path,
        "--config-file",
        "quick_schedules/mask_rcnn_rcca_R_18_FPN_overfit.py",
        "--image-size=96x128",
        "--training-step",
        "--no-time",
        "train.device=cpu",
        "+model.roi_heads.box_predictor.test_score_thresh=0.9",  # which nothing reaches
    )
    modules = result["modules"]
    detections, size, channels = 20, 14, 64  # many of the 50 proposals remain, and the mask head's map
    convolutions = 2 * detections * 3 * size**2 * 9 * channels**2
    assert modules["roi_heads.mask_head"]["gflops"] > convolutions / 1e9
    assert result["training_peak_mb"] > result["training_kept_mb"] > 0
