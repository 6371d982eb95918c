"""Segmenting videos into videos: class colours over every frame, over a legend that stays in its place."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field

import cv2
import numpy as np
from tqdm import tqdm

from ccnet_d2.errors import UserError

from .classes import ClassTable
from .drawing import PAPER, legend, legend_text_size, stack
from .predictor import Prediction
from .video_files import VideoSource, VideoWriter
from .video_predictor import VideoPredictor
from .visualize import overlay

__all__ = ["VideoPainter", "VideoResult", "show_video", "write_video"]

_LEGEND_CLASSES = 40  # above this number the legend shows the frame's most frequent classes
_LEGEND_SHOWN = 20
_QUIT_KEYS = (ord("q"), 27)


@dataclass
class VideoResult:
    """What became of a video: the number of frames segmented, and a sentence for all that could not be read."""

    frames: int = 0
    problems: list[str] = field(default_factory=list)


class VideoPainter:
    """Draws frames of one size: class colours over the frame, and below it the legend.

    The legend lists all classes in their order, so that it does not move; with more than 40 classes the 20 most
    frequent ones of each frame, in an area of fixed height.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        """
        Args:
            alpha: weight of the colours against the image.
        """
        self.alpha = alpha
        self._all: np.ndarray | None = None  # the legend of all classes
        self._height = 0

    def __call__(self, prediction: Prediction) -> np.ndarray:
        """Picture of a frame, (height, width, 3) uint8; the size is the same for all frames of a video."""
        classes = prediction.classes
        picture = overlay(prediction.image, prediction.labels, classes, alpha=self.alpha, with_legend=False)
        width = picture.shape[1]
        if self._all is None:
            longest = sorted(range(len(classes)), key=lambda index: -len(classes.names[index]))
            shown = range(len(classes)) if len(classes) <= _LEGEND_CLASSES else longest[:_LEGEND_SHOWN]
            self._all = legend(classes, list(shown), width, size=legend_text_size(width))
            self._height = len(self._all)
        if len(classes) <= _LEGEND_CLASSES:
            return stack([picture, self._all])
        return stack([picture, self._fitted(_most_frequent(prediction.labels, classes), classes, width)])

    def _fitted(self, present: list[int], classes: ClassTable, width: int) -> np.ndarray:
        drawn = legend(classes, present, width, size=legend_text_size(width))[: self._height]
        area = np.full((self._height, drawn.shape[1], 3), PAPER, np.uint8)
        area[: len(drawn)] = drawn
        return area


def write_video(
    predictor: VideoPredictor,
    source: VideoSource,
    output: str | os.PathLike[str],
    *,
    progress: bool = True,
    fps: float | None = None,
) -> VideoResult:
    """Segment a video into another; frames that cannot be read are left out and named.

    Args:
        predictor: the model.
        source: see `open_video`.
        output: see `VideoWriter`.
        progress: show a progress bar on stderr.
        fps: frames per second of the result; default: those of the source.

    Raises:
        UserError: the output cannot be written, or no frame can be read; nothing is left behind then.
    """
    written, read = os.path.expanduser(output), os.path.expanduser(source.name)
    if os.path.exists(written) and os.path.exists(read) and os.path.samefile(written, read):
        raise UserError(f"the result would overwrite '{source.name}': choose another output.")
    result = VideoResult()
    paint = VideoPainter()
    with VideoWriter(output, fps or source.fps) as writer:
        for prediction in tqdm(
            predictor.video(source), total=source.count, unit="frame", disable=not progress
        ):
            writer.write(paint(prediction))
        result.frames = writer.written
        result.problems = list(source.problems)
        if not result.frames:
            raise UserError(
                f"no frame of '{source.name}' can be read"
                + (f": {result.problems[0]}" if result.problems else ".")
            )
    return result


def show_video(
    predictor: VideoPredictor,
    source: VideoSource,
    output: str | os.PathLike[str] | None = None,
    *,
    fps: float | None = None,
    title: str = "ccnet_d2 (q ends)",
) -> VideoResult:
    """Segment a camera's pictures in a window, and into a file if `output` is given, until q, Escape or Ctrl-C.

    Without windows (a server, or opencv-python-headless) it records only, until Ctrl-C.

    Raises:
        UserError: there are neither windows nor an output.
    """
    window = _has_windows()
    if not window and output is None:
        raise UserError(
            "this OpenCV opens no windows here: name a file to record to (--output), or install opencv-python in place "
            "of opencv-python-headless on a machine with a screen."
        )
    result = VideoResult()
    paint = VideoPainter()
    with ExitStack() as opened:
        writer = None if output is None else opened.enter_context(VideoWriter(output, fps or source.fps))
        try:
            for prediction in predictor.video(source):
                picture = paint(prediction)
                if writer is not None:
                    writer.write(picture)
                result.frames += 1
                if window:
                    cv2.imshow(title, picture[:, :, ::-1])
                    if cv2.waitKey(1) & 0xFF in _QUIT_KEYS:
                        break
        except KeyboardInterrupt:
            pass  # how a recording without a window ends
        if window:
            cv2.destroyAllWindows()
    result.problems = list(source.problems)
    return result


def _has_windows() -> bool:
    try:
        cv2.namedWindow("ccnet_d2 probe")
        cv2.destroyWindow("ccnet_d2 probe")
    except cv2.error:
        return False
    return True


def _most_frequent(labels: np.ndarray, classes: ClassTable) -> list[int]:
    counts = np.bincount(labels.ravel(), minlength=len(classes))[: len(classes)]
    order = np.argsort(-counts, kind="stable")[:_LEGEND_SHOWN]
    return [int(index) for index in order if counts[index]]
