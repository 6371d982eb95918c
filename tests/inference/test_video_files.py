"""Videos in and out, whole and damaged."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from ccnet_d2.errors import UserError
from ccnet_d2.inference import video_files
from ccnet_d2.inference.video_files import Camera, FrameFolder, VideoFile, VideoWriter, open_video


def moving_square(count, height=48, width=64):
    """Frames whose left half is bright by the frame's number, so that their order can be read off."""
    frames = np.full((count, height, width, 3), 200, np.uint8)
    for t in range(count):
        frames[t, :, : width // 2] = 8 * t
    return frames


def order(frames):
    return [round(float(frame[:, : frame.shape[1] // 4].mean()) / 8) for frame in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / "new" / f"video{suffix}"
    frames = moving_square(20)
    with VideoWriter(path, fps=12.5) as writer:
        for frame in frames:
            writer.write(frame)
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with open_video(path) as video:
        assert video.fps == pytest.approx(12.5, rel=1e-3)
        found = list(video)
        assert video.problems == [] and abs(video.count - 20) <= 1
    assert order(found) == list(range(20))
    assert np.abs(np.stack(found).astype(int) - frames).mean() < 6  # lossy, and in RGB order


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [29.97002997002997, 65.5354, 89.123, 239.8731, 655.36, 999.999])
def test_rates_of_slow_motion_are_kept(tmp_path, fps, suffix):
    """Telephones' are odd averages, and MPEG-4 takes no more than 65535 parts of a second."""
    path = tmp_path / f"video{suffix}"
    with VideoWriter(path, fps) as writer:
        for frame in moving_square(4):
            writer.write(frame)
    with open_video(path) as video:
        assert video.fps == pytest.approx(fps, rel=2e-4)
        assert len(list(video)) == 4 and video.problems == []


def test_colours_keep_their_order(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    with VideoWriter(tmp_path / "red.mp4", 10) as writer:
        writer.write(red)
    (frame,) = list(open_video(tmp_path / "red.mp4"))
    assert frame[..., 0].mean() > 200 and frame[..., 2].mean() < 50


def test_odd_sizes_get_a_row_and_a_column(tmp_path):
    for suffix in (".mp4", ".avi"):
        path = tmp_path / f"odd{suffix}"
        with VideoWriter(path, 10) as writer:
            for frame in moving_square(3, 47, 61):
                writer.write(frame)
        found = list(open_video(path))
        assert [frame.shape for frame in found] == [(48, 62, 3)] * 3
        assert found[0][-1].mean() > 150 and found[0][:, -1].mean() > 200


def test_leaving_by_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), VideoWriter(tmp_path / "a.mp4", 10) as writer:
        writer.write(moving_square(1)[0])
        raise KeyError
    with VideoWriter(tmp_path / "empty.mp4", 10):
        pass
    with pytest.raises(ValueError, match=r"a frame of \(24, 64\) in a video of \(48, 64\)"):
        with VideoWriter(tmp_path / "b.mp4", 10) as writer:
            writer.write(moving_square(1)[0])
            writer.write(moving_square(1, 24)[0])
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(tmp_path):
    for name in ("video.xyz", "video", "video.png"):
        with pytest.raises(UserError, match=r"is no video type known here, take one of \.mp4"):
            VideoWriter(tmp_path / name, 10)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match="it is a folder, name a file in it"):
        VideoWriter(tmp_path / "folder.mp4", 10)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be made"),
        VideoWriter(tmp_path / "file" / "a.mp4", 10) as writer,
    ):
        writer.write(moving_square(1)[0])


@pytest.mark.parametrize(("width", "height"), [(8192, 16), (16, 8192), (8191, 16)])
def test_frames_too_large_for_mpeg_4(tmp_path, width, height):
    """Of panoramas; it was said that the folder cannot be written or the encoder is missing. An odd side gets one."""
    frame = np.full((height, width, 3), 77, np.uint8)
    size = f"{width + width % 2}x{height}"
    message = (
        rf"video\.mp4': MPEG-4 has no more than 8191 pixels a side, and the frames are {size}: take \.avi"
    )
    with pytest.raises(UserError, match=message), VideoWriter(tmp_path / "new" / "video.mp4", 10) as writer:
        writer.write(frame)
    assert list(tmp_path.iterdir()) == []
    for path, smaller in (("video.avi", frame), ("video.mkv", frame[:8190, :8190])):
        with VideoWriter(tmp_path / path, 10) as writer:
            writer.write(smaller)
        (found,) = open_video(tmp_path / path)
        assert found.shape[0] == smaller.shape[0] and abs(np.median(found) - 77) <= 6


def test_names_as_long_as_they_can_be(tmp_path):
    with VideoWriter(tmp_path / f"{'a' * 251}.mp4", 10) as writer:
        writer.write(moving_square(1)[0])
    assert os.listdir(tmp_path) == [f"{'a' * 251}.mp4"]
    with (
        pytest.raises(UserError, match=r"cannot write '.*a\.mp4': File name too long\.$"),
        VideoWriter(tmp_path / f"{'a' * 252}.mp4", 10) as writer,
    ):
        writer.write(moving_square(1)[0])
    assert len(os.listdir(tmp_path)) == 1


def test_a_name_that_begins_with_a_tilde_is_one(tmp_path, monkeypatch):
    """Of no user's home."""
    monkeypatch.chdir(tmp_path)
    with VideoWriter("~nobody's.mp4", 10) as writer:
        writer.write(moving_square(1)[0])
    assert os.listdir(tmp_path) == ["~nobody's.mp4"]
    assert len(list(open_video("~nobody's.mp4"))) == 1
    with pytest.raises(UserError, match=r"video '~none\.mp4' does not exist"):
        open_video("~none.mp4")


def test_damaged_videos(tmp_path):
    path = tmp_path / "whole.avi"
    with VideoWriter(path, 10) as writer:
        for frame in moving_square(30):
            writer.write(frame)
    data = path.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: 3 * len(data) // 4])
    with open_video(tmp_path / "cut.avi") as video:
        found = list(video)
        assert 0 < len(found) < 29 and order(found) == list(range(len(found)))
        assert video.problems == [
            f"video '{tmp_path / 'cut.avi'}' ends after {len(found)} of 30 frames: it is damaged or cut short."
        ]
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4"):
        with pytest.raises(UserError, match=f"{name}' cannot be read as a video"):
            open_video(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.mp4' does not exist"):
        VideoFile(tmp_path / "none.mp4")


@pytest.fixture
def video_that_says(tmp_path, monkeypatch):
    """Opens a video of so many frames whose container says this of itself."""

    def video_that_says(frames, fps, count):
        said = {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: count}
        reads = iter([(True, moving_square(1)[0])] * frames)
        capture = SimpleNamespace(read=lambda: next(reads, (False, None)), get=said.get, release=lambda: None)
        monkeypatch.setattr(video_files, "_capture", lambda path: capture)
        (tmp_path / "video.mp4").touch()
        return open_video(tmp_path / "video.mp4")

    return video_that_says


@pytest.mark.parametrize("fps", [0.0, -25.0, math.nan, math.inf, 1000.1, 90000.0])
def test_rates_that_are_none_are_those_of_films(video_that_says, fps):
    assert video_that_says(1, fps, 1).fps == 25
    assert video_that_says(1, 1000.0, 1).fps == 1000


@pytest.mark.parametrize("count", [0.0, -9e15, math.nan, math.inf])
def test_lengths_that_a_container_does_not_know(video_that_says, count):
    with video_that_says(3, 25.0, count) as video:
        assert video.count is None and len(list(video)) == 3 and video.problems == []


@pytest.mark.parametrize(
    ("frames", "count", "told"), [(9, 10, False), (8, 10, True), (196, 200, False), (195, 200, True)]
)
def test_estimated_lengths_may_be_off_by_a_frame_or_a_fiftieth(video_that_says, frames, count, told):
    with video_that_says(frames, 25.0, float(count)) as video:
        assert len(list(video)) == frames
    assert bool(video.problems) is told
    assert not told or f"ends after {frames} of {count} frames" in video.problems[0]


def test_suffixes_in_capital_letters(tmp_path):
    with VideoWriter(tmp_path / "VIDEO.MP4", 10) as writer:
        writer.write(moving_square(1)[0])
    assert os.listdir(tmp_path) == ["VIDEO.MP4"]


# A superscript is a digit to str.isdigit, and no number to int.
@pytest.mark.parametrize("name", ["frame_{}", "{}", "²{}", "take 2³{} of 3"])
def test_folders_are_read_in_the_order_of_numbers(tmp_path, name):
    frames = moving_square(12, 24, 32)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{name.format(t)}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = open_video(tmp_path)
    assert isinstance(video, FrameFolder) and video.count == 12 and video.fps == 10
    assert np.array_equal(np.stack(list(video)), frames)


def test_broken_frames_of_a_folder_are_left_out_and_named(tmp_path):
    for t, frame in enumerate(moving_square(5, 24, 32)):
        Image.fromarray(frame[: 20 if t == 3 else 24]).save(tmp_path / f"{t}.png")
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    video = open_video(tmp_path)
    assert order(list(video)) == [0, 2, 4]
    assert len(video.problems) == 2
    assert "1.png' is truncated" in video.problems[0]
    assert video.problems[1].endswith("3.png' is 32x20 in a video of 32x24.")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no image"):
        open_video(empty)


def test_no_camera_is_one_sentence():
    number = 97
    probe = cv2.VideoCapture(number)
    if probe.isOpened():
        pytest.skip("there is a camera 97")
    with pytest.raises(UserError, match="camera 97 cannot be opened"):
        Camera(number)


@pytest.mark.parametrize("number", [-1, 2**31])
def test_numbers_that_no_camera_has_do_not_reach_opencv(number):
    with pytest.raises(UserError, match=f"camera {number} cannot be opened: cameras are numbered from 0"):
        Camera(number)


def test_ffmpeg_says_nothing_of_its_own_after_a_video_was_written(tmp_path):
    """It takes its level of talk from the first video of a process, which may be one that is written."""
    script = """
import sys
from pathlib import Path
import numpy as np
from ccnet_d2.errors import UserError
from ccnet_d2.inference.video_files import VideoWriter, open_video

video = Path(sys.argv[1], "video.mp4")
with VideoWriter(video, 10) as writer:
    for _ in range(3):
        writer.write(np.zeros((32, 32, 3), np.uint8))
data = video.read_bytes()
video.write_bytes(data[: len(data) // 2])
try:
    open_video(video)
except UserError as error:
    print(error)
"""
    # The other tests have set it for this process.
    environment = {key: value for key, value in os.environ.items() if key != "OPENCV_FFMPEG_LOGLEVEL"}
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "cannot be read as a video" in done.stdout
    assert done.stderr == ""
