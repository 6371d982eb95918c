"""Videos through demo.py."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.inference.video_files import VideoWriter, open_video
from ccnet_d2.model_zoo import get_config
from tests.scripts import load_script

CLIPS = "camvid/ccnet3d_T5_R_18_D8_half.py"
SMALL = [
    "model.sem_seg_head.channels=16",
    "model.sem_seg_head.aux_channels=8",
    "dataloader.test.mapper.augmentations.0.long_side=48",
    "dataloader.test.mapper.augmentations.0.short_side=36",
    "train.device=cpu",
]


@pytest.fixture(scope="module")
def demo():
    return load_script("demo.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a model of clips, and of one of single frames."""
    from ccnet_d2.engine import apply_overrides

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, config, options in (("clips", CLIPS, SMALL), ("frames", "toy/ccnet_synthetic.py", [])):
        model = instantiate(apply_overrides(get_config(config), options).model)
        torch.save({"model": model.state_dict()}, folder / f"{name}.pth")
    return folder


@pytest.fixture
def run(demo, weights, capsys):
    def call(*arguments, clips=True):
        config, name = (CLIPS, "clips") if clips else ("toy/ccnet_synthetic.py", "frames")
        argv = ["--config-file", config, "--checkpoint", str(weights / f"{name}.pth"), *map(str, arguments)]
        if clips:
            argv += ["--opts", *SMALL]
        try:
            status = demo.main(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (7, 46, 62, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "in.avi", 12) as writer:
        for frame in frames:
            writer.write(frame)
    return tmp_path / "in.avi"


@pytest.mark.parametrize("clips", [True, False])
def test_a_video_becomes_a_video(run, video, tmp_path, clips):
    out = tmp_path / "new" / "out.mp4"
    status, printed, shown = run("--video-input", video, "--output", out, clips=clips)
    assert status == 0, shown
    assert printed == f"7 frames written to {out}\n"
    assert "7/7" in shown  # progress
    with open_video(out) as result:
        assert result.fps == pytest.approx(12, rel=1e-3)
        frames = list(result)
    # Enlarged to be readable, with a legend below.
    assert len(frames) == 7 and frames[0].shape[1] >= 240 and frames[0].shape[0] > 46 * 4


def test_a_folder_and_clip_options(run, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(6):
        image = np.random.default_rng(t).integers(0, 256, (31, 45, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"f{t}.png")
    options = ["--clip-length", 3, "--clip-stride", 1, "--clip-step", 2, "--fps", 4]
    assert run("--video-input", folder, "--output", tmp_path / "a.mp4", *options)[0] == 0
    with open_video(tmp_path / "a.mp4") as result:
        assert result.fps == pytest.approx(4, rel=1e-3) and len(list(result)) == 6


def test_a_broken_frame_fails_and_the_rest_is_written(run, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(3):  # also shorter than a clip
        Image.fromarray(np.full((30, 40, 3), 50 * t, np.uint8)).save(folder / f"{t}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    status, printed, error = run("--video-input", folder, "--output", tmp_path / "out.mp4")
    assert status == 1 and printed == f"2 frames written to {tmp_path / 'out.mp4'}\n"
    assert error.splitlines()[-1].startswith("error: The image '") and "1.png' is truncated" in error
    assert len(list(open_video(tmp_path / "out.mp4"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video-input", "none.mp4"], "error: video 'none.mp4' does not exist."),
        (["--video-input", "{text}"], "cannot be read as a video"),
        (
            ["--video-input", "{video}", "--output", "out.gif"],
            "'.gif' is no video type known here, take one of .mp4",
        ),
        (["--video-input", "{video}", "--clip-stride", "9"], "clips of 5 frames cannot start every 9 frames"),
        (
            ["--video-input", "{video}", "--mode", "slide"],
            "not in the test mode SlidingWindow: leave the mode out",
        ),
        (["--video-input", "{video}", "--labels"], "videos are written as overlays"),
        (["--video-input", "{video}", "--attention", "1,1"], "videos are written as overlays"),
        (["--video-input", "{video}", "--input", "a.png"], "not allowed with argument"),
        (["--video-input", "{video}", "--fps", "0"], "--fps must be above 0"),
        (["--input", "{video}", "--clip-length", "3"], "--clip-length needs --video-input or --webcam"),
        (["--webcam", "97"], "error: camera 97 cannot be opened"),
        ([], "one of the arguments --input --video-input --webcam is required"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(run, video, tmp_path, monkeypatch, arguments, message):
    if "97" in arguments and cv2.VideoCapture(97).isOpened():
        pytest.skip("there is a camera 97")
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    arguments = [part.format(video=video, text=text) for part in arguments]
    before = sorted(path.name for path in tmp_path.iterdir())
    output = [] if "--output" in arguments else ["--output", "out.mp4"]
    status, printed, error = run(*arguments, *output)
    assert status in (1, 2) and not printed
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_output_it_says_what_to_do(run, video):
    status, _, error = run("--video-input", video)
    assert status == 2 and "--output is needed" in error
