"""Pictures of videos: legend, sizes, and what is left when something goes wrong."""

import cv2
import numpy as np
import pytest
from PIL import Image

from ccnet_d2.errors import UserError
from ccnet_d2.inference import ClassTable
from ccnet_d2.inference.drawing import legend
from ccnet_d2.inference.predictor import Prediction
from ccnet_d2.inference.video import VideoPainter, show_video, write_video
from ccnet_d2.inference.video_files import VideoSource, open_video
from ccnet_d2.inference.video_predictor import VideoPredictor
from ccnet_d2.inference.visualize import overlay


@pytest.fixture
def predictor(make_segmenter):
    return VideoPredictor(
        make_segmenter(), classes=ClassTable.create(["sky", "road", "tree", "car", "person"])
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "frames"
    path.mkdir()
    for t in range(4):
        Image.fromarray(rng.integers(0, 256, (27, 33, 3), dtype=np.uint8)).save(path / f"{t}.png")
    return path


def test_the_legend_stays_in_its_place():
    classes = ClassTable.create(["sky", "road", "tree"])
    paint = VideoPainter()
    image = np.full((60, 260, 3), 90, np.uint8)
    pictures = [
        paint(Prediction(image, np.full((60, 260), label, np.uint8), None, classes)) for label in (0, 2)
    ]
    for label, picture in zip((0, 2), pictures, strict=True):
        expected = overlay(image, np.full((60, 260), label, np.uint8), classes, with_legend=False)
        assert np.array_equal(picture[:60], expected)
    assert np.array_equal(pictures[0][60:], pictures[1][60:])
    for color in classes.colors:
        assert (pictures[0][60:] == color).all(axis=-1).sum() > 100  # every class has its swatch


def test_with_many_classes_the_legend_shows_those_of_the_frame():
    classes = ClassTable.numbered(150)
    paint = VideoPainter()
    image = np.full((100, 260, 3), 90, np.uint8)
    few = np.zeros((100, 260), np.uint8)
    many = np.arange(100 * 260, dtype=np.int64).reshape(100, 260) % 150
    shapes = set()
    for labels, shown in ((few, [0]), (many.astype(np.uint8), list(range(20)))):
        picture = paint(Prediction(image, labels, None, classes))
        shapes.add(picture.shape)
        drawn = legend(classes, shown, 260, size=13)
        height = min(len(drawn), len(picture) - 100)
        assert np.array_equal(picture[100 : 100 + height], drawn[:height])
    assert len(shapes) == 1


def test_a_folder_of_frames_of_odd_size_becomes_a_video(predictor, folder, tmp_path):
    out = tmp_path / "out.avi"
    with open_video(folder) as source:
        result = write_video(predictor, source, out, progress=False, fps=5)
    assert (result.frames, result.problems) == (4, [])
    with open_video(out) as video:
        assert video.fps == pytest.approx(5)
        written = list(video)
    assert len(written) == 4 and not any(side % 2 for side in written[0].shape[:2])
    with open_video(folder) as source:
        expected = [VideoPainter()(one) for one in predictor.video(source)]
    height, width = expected[0].shape[:2]
    for found, picture in zip(written, expected, strict=True):
        assert np.abs(found[:height, :width].astype(int) - picture).mean() < 12  # Motion JPEG loses a little


def test_broken_frames_are_left_out_and_named(predictor, folder, tmp_path):
    (folder / "2.png").write_bytes(b"broken")
    with open_video(folder) as source:
        result = write_video(predictor, source, tmp_path / "out.mp4", progress=False)
    assert result.frames == 3 and len(result.problems) == 1 and "2.png" in result.problems[0]
    for t in range(4):
        (folder / f"{t}.png").write_bytes(b"broken")
    with (
        open_video(folder) as source,
        pytest.raises(UserError, match=r"no frame of .* can be read: The image"),
    ):
        write_video(predictor, source, tmp_path / "none.mp4", progress=False)
    assert not (tmp_path / "none.mp4").exists()


def test_a_failure_on_the_way_leaves_no_video(predictor, folder, tmp_path):
    class Breaks(VideoSource):
        name, fps, count = "breaks", 10.0, None

        def __iter__(self):
            yield np.zeros((8, 8, 3), np.uint8)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_video(predictor, Breaks(), tmp_path / "out.mp4", progress=False)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_source_is_not_overwritten(predictor, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    video = tmp_path / "video.mp4"
    with open_video(folder) as source:
        write_video(predictor, source, video, progress=False)
    data = video.read_bytes()
    for name in (video, "~/video.mp4"):
        with open_video(name) as source, pytest.raises(UserError, match="would overwrite"):
            write_video(predictor, source, name, progress=False)
    assert video.read_bytes() == data


def test_a_live_recording_ends_with_ctrl_c_and_is_whole(predictor, folder, tmp_path, monkeypatch):
    """The source is a folder here: what a camera adds is where the frames come from."""
    monkeypatch.setattr("ccnet_d2.inference.video._has_windows", lambda: False)

    class Interrupted(VideoSource):
        name, fps, count = "camera", 10.0, None

        def __iter__(self):
            yield from open_video(folder)
            raise KeyboardInterrupt

    result = show_video(predictor, Interrupted(), tmp_path / "live.mp4")
    assert result.frames == 4 and len(list(open_video(tmp_path / "live.mp4"))) == 4
    with pytest.raises(UserError, match="opens no windows here: name a file to record to"):
        show_video(predictor, Interrupted())


@pytest.mark.parametrize("key", [ord("q"), 27, 0x100000 | ord("q")])  # the last with the bits of a modifier
def test_a_live_window_shows_every_picture_until_a_key(predictor, folder, monkeypatch, key):
    """Windows are made of lists here: this machine may have no screen."""
    shown, windows, keys = [], [], iter((-1, ord("a"), key))
    monkeypatch.setattr(cv2, "namedWindow", windows.append)
    monkeypatch.setattr(cv2, "destroyWindow", windows.remove)
    monkeypatch.setattr(cv2, "destroyAllWindows", shown.clear)
    pictures = []

    def show(title, picture):
        assert not windows  # the probe is gone
        shown.append(title)
        pictures.append(picture.copy())

    monkeypatch.setattr(cv2, "imshow", show)
    monkeypatch.setattr(cv2, "waitKey", lambda delay: next(keys))
    with open_video(folder) as source:
        result = show_video(predictor, source, title="live")
    assert result.frames == 3 and shown == []
    with open_video(folder) as source:
        expected = [VideoPainter()(one) for one in predictor.video(source)][:3]
    assert np.array_equal(np.stack(pictures)[..., ::-1], np.stack(expected))
