import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.model_zoo import get_config
from tests.scripts import PROJECT, load_script

_SCRIPT = PROJECT / "demo.py"
_CONFIG = "toy/ccnet_synthetic.py"


@pytest.fixture(scope="module")
def demo():
    return load_script("demo.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save({"model": instantiate(get_config(_CONFIG).model).state_dict()}, path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (48, 48)), ("b.jpg", (36, 60))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def run(demo, checkpoint, capsys):
    def call(*arguments, config=_CONFIG, weights=checkpoint):
        argv = ["--config-file", config, *map(str, arguments)]
        if weights:
            argv += ["--checkpoint", weights]
        try:
            status = demo.main(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


@pytest.mark.parametrize(
    "picture", [[], ["--overlay"], ["--side-by-side"], ["--confidence"], ["--attention", "20,30"]]
)
def test_a_folder_becomes_a_folder_of_pictures(run, photos, tmp_path, picture):
    out = tmp_path / "out"
    status, printed, _ = run("--input", photos, "--output", out, *picture)
    assert status == 0
    assert printed == f"2 written to {out}\n"
    assert files(out) == ["a.png", "b.png"]
    sizes = {path.name: Image.open(path).size for path in out.iterdir()}
    assert min(max(size) for size in sizes.values()) >= 240  # small images are enlarged


def test_label_maps_are_what_the_predictor_gives(run, photos, tmp_path, checkpoint):
    from ccnet_d2.inference import Predictor

    out = tmp_path / "labels"
    mode = ["--mode", "slide", "--tile", "24", "32", "--stride", "16", "--tiles-per-batch", "2"]
    assert run("--input", str(photos / "*"), "--output", out, "--labels", *mode)[0] == 0
    from ccnet_d2.inference import SlidingWindow

    predictor = Predictor(_CONFIG, checkpoint, mode=SlidingWindow(tile=(24, 32), stride=16))
    for name in ("a.png", "b.jpg"):
        written = np.asarray(Image.open(out / f"{Path(name).stem}.png"))
        assert np.array_equal(written, predictor(photos / name).labels)


@pytest.mark.slow
def test_two_devices_share_a_folder(run, photos, tmp_path):
    out, alone = tmp_path / "two", tmp_path / "one"
    options = ["--input", photos, "--labels", "--opts", "train.device=cpu"]
    status, printed, _ = run("--output", out, "--devices", "cpu,cpu", *options)
    assert status == 0 and printed == f"2 written to {out}\n"
    assert run("--output", alone, *options)[0] == 0
    for name in ("a.png", "b.png"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("catalogs_as_before")
def test_a_data_set_that_the_run_s_file_registers_is_known_on_every_device(run, photos, tmp_path):
    """As docs/train-on-your-own-data.md has it; each process would know the project's own sets alone."""
    config = tmp_path / "my_street.py"
    config.write_text(f"""
from ccnet_d2.data import register_sem_seg_folder
from ccnet_d2.model_zoo import get_config

register_sem_seg_folder("my_street_val", "images", "labels", classes=["road", "car", "person", "tree"])
_run = get_config("{_CONFIG}")
model, dataloader, train = _run.model, _run.dataloader, _run.train
dataloader.test.dataset.names = "my_street_val"
""")
    out = tmp_path / "out"
    status, printed, errors = run(
        "--input", photos, "--output", out, "--devices", "cpu,cpu", config=str(config)
    )
    assert (status, printed) == (0, f"2 written to {out}\n"), errors


def test_multi_scale_and_a_single_file(run, photos, tmp_path):
    out = tmp_path / "new" / "one.jpg"
    options = ["--mode", "ms-slide", "--tile", "40", "--scales", "0.5", "1", "--no-flip"]
    assert run("--input", photos / "a.png", "--output", out, *options)[0] == 0
    assert Image.open(out).format == "JPEG"


def test_ground_truth_adds_two_panels(run, photos, tmp_path):
    truth = tmp_path / "truth"
    truth.mkdir()
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(truth / "a.png")
    options = ["--input", photos / "a.png", "--side-by-side"]
    assert run(*options, "--output", tmp_path / "two.png")[0] == 0
    assert run(*options, "--output", tmp_path / "four.png", "--ground-truth", truth)[0] == 0
    two, four = (Image.open(tmp_path / name).size[0] for name in ("two.png", "four.png"))
    assert four - two == 2 * (240 + 8)
    Image.fromarray(np.zeros((48, 47), np.uint8)).save(truth / "a.png")
    status, _, error = run(*options, "--output", tmp_path / "bad.png", "--ground-truth", truth)
    assert status == 1 and "47x48, but its image" in error
    assert not (tmp_path / "bad.png").exists()


def test_weights_may_be_named_by_override(run, photos, tmp_path, checkpoint):
    options = ["--input", photos / "a.png", "--output", tmp_path / "a.png"]
    assert run(*options, "--opts", f"train.init_checkpoint={checkpoint}", weights=None)[0] == 0
    status, _, error = run(*options, weights=None)
    assert status == 1
    assert error.splitlines()[-1].startswith("error: no weights to predict with")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "missing.png"}, "error: image 'missing.png' does not exist."),
        ({"--input": "*.missing"}, "error: pattern '*.missing' matches no image."),
        ({"--opts": "model.colour=1"}, "error: Unknown key 'model.colour'"),
        ({"--opts": "model"}, "error: Override 'model' is not of the form key=value."),
        ({"--attention": "48,0"}, "error: pixel (48, 0) lies outside the image of 48x48"),
        ({"--attention": "20;30"}, "demo.py: error: argument --attention: '20;30' is not X,Y"),
        ({"--attention": "2²,30"}, "demo.py: error: argument --attention: '2²,30' is not X,Y"),
        ({"--mode": "sliding"}, "argument --mode: invalid choice: 'sliding'"),
        (
            {"--mode": "slide", "--tile": "8", "--stride": "9"},
            "error: stride (9, 9) is larger than tile (8, 8)",
        ),
        ({"--tile": "8"}, "error: --tile needs --mode slide or ms-slide"),
        ({"--scales": "1", "--mode": "slide"}, "error: --scales needs --mode ms or ms-slide"),
        ({"--no-flip": ""}, "error: --no-flip needs --mode ms or ms-slide"),
        ({"--no-flip": "", "--mode": "slide"}, "error: --no-flip needs --mode ms or ms-slide"),
        ({"--zoom": "2"}, "unrecognized arguments: --zoom 2"),
        (
            {"--devices": "all"},
            "" if torch.cuda.is_available() else "error: 'all' means every GPU, but torch sees",
        ),
        ({"--devices": "cpu,cuda:9"}, "error: device 'cuda:9' was asked for, but torch sees"),
        ({"--opts": "train.device=cuda"}, "" if torch.cuda.is_available() else "torch sees no GPU"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(run, photos, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    given = {"--input": photos / "a.png", "--output": tmp_path / "out", **change}
    status, printed, error = run(*(part for pair in given.items() for part in pair if part != ""))
    if not message:
        pytest.skip("a GPU is there")
    assert status in (1, 2) and not printed
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert files(tmp_path / "out") is None


def test_unknown_configs_and_checkpoints_are_one_sentence(run, photos, tmp_path):
    options = ["--input", photos, "--output", tmp_path / "out"]
    status, _, error = run(*options, config="toy/ccnet.py")
    assert status == 1 and error.startswith("error: There is no config 'toy/ccnet.py'")
    status, _, error = run(*options, weights=str(tmp_path / "none.pth"))
    assert status == 1 and "none.pth" in error.splitlines()[-1]
    assert files(tmp_path / "out") is None


def test_without_output_it_says_what_to_do(run, photos):
    status, _, error = run("--input", photos)
    assert status == 2
    assert "--output is needed: name a folder, or a .png file" in error


def test_pictures_exclude_each_other(run, photos, tmp_path):
    status, _, error = run("--input", photos, "--output", tmp_path / "out", "--labels", "--overlay")
    assert status == 2 and "not allowed with argument" in error
    status, _, error = run(
        "--input", photos, "--output", tmp_path / "out", "--attention", "1,1", "--mode", "ms"
    )
    assert status == 2 and "leave --mode out" in error


def test_as_a_program_a_truncated_image_fails_and_the_rest_is_written(photos, tmp_path, checkpoint):
    whole = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, str(_SCRIPT), "--config-file", _CONFIG, "--checkpoint", checkpoint]
    command += ["--input", str(photos), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(_SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cut.png" in done.stderr.splitlines()[-1] and "truncated" in done.stderr.splitlines()[-1]
    assert "2 written to" in done.stdout
    assert files(tmp_path / "out") == ["a.png", "b.png"]
