"""Videos as they come and go: files, folders of frames, cameras; and writing a video so that it is there whole or not.

Frames are (H, W, 3) uint8 RGB arrays.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from ccnet_d2.data.errors import SampleError
from ccnet_d2.data.image_files import read_image
from ccnet_d2.errors import UserError

from .images import ImageFileError, find_images

__all__ = ["VIDEO_CODECS", "Camera", "FrameFolder", "VideoFile", "VideoSource", "VideoWriter", "open_video"]

VIDEO_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
"""What `VideoWriter` writes, by the file's suffix."""

FOLDER_FPS = 10.0
_DEFAULT_FPS = 25.0
_MOST_TICKS = 2**16 - 1  # in a second, of MPEG-4
_LONGEST_SIDE = 2**13 - 1  # of its pictures
# Containers that do not store the number of frames have it estimated from the duration.
_TOLERATED_SHARE_MISSING = 0.02


class VideoSource:
    """Frames in order, read one at a time as they are asked for.

    Attributes:
        name: what to call it in messages.
        fps: frames per second.
        count: number of frames as far as it is known beforehand, else None.
        problems: after the last frame, a sentence for everything that could not be read.
    """

    name: str
    fps: float
    count: int | None

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and devices."""

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class VideoFile(VideoSource):
    """A video in any format that this OpenCV decodes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            UserError: the file is missing, or no video that this OpenCV can decode.
        """
        super().__init__()
        self.name = os.fspath(path)
        file = os.path.expanduser(path)
        if not os.path.isfile(file):
            raise UserError(f"video '{path}' does not exist.")
        self._capture = _capture(os.fspath(file))
        readable, self._first = self._capture.read()
        if not readable:
            self._capture.release()
            raise UserError(
                f"'{path}' cannot be read as a video: it is damaged, or of a kind OpenCV does not decode."
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else _DEFAULT_FPS  # not a number, too, fails both comparisons
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.count = int(count) if math.isfinite(count) and count >= 1 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        readable, frame, read = True, self._first, 0
        while readable:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            read += 1
            readable, frame = self._capture.read()
        if self.count is not None and read < self.count - max(1, _TOLERATED_SHARE_MISSING * self.count):
            self.problems.append(
                f"video '{self.name}' ends after {read} of {self.count} frames: it is damaged or cut short."
            )

    def close(self) -> None:
        self._capture.release()


class Camera(VideoSource):
    """A camera of this machine; goes on until nobody asks for another frame."""

    def __init__(self, index: int = 0) -> None:
        """
        Raises:
            UserError: there is no such camera, or it gives no picture.
        """
        super().__init__()
        if not 0 <= index < 2**31:  # OpenCV crashes on negative numbers, and cannot take larger ones
            raise UserError(f"camera {index} cannot be opened: cameras are numbered from 0.")
        self.name = f"camera {index}"
        self.count = None
        _quiet()
        self._capture = cv2.VideoCapture(index)
        readable, self._first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not readable:
            self._capture.release()
            raise UserError(f"camera {index} cannot be opened: is one connected, and may this user read it?")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else _DEFAULT_FPS

    def __iter__(self) -> Iterator[np.ndarray]:
        readable, frame = True, self._first
        while readable:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            readable, frame = self._capture.read()
        self.problems.append(f"{self.name} gives no more pictures.")

    def close(self) -> None:
        self._capture.release()


class FrameFolder(VideoSource):
    """The images of a folder, ordered by name with numbers as numbers (frame_2 before frame_10).

    A frame that cannot be read, or has another size than the first one, is left out and named in `problems`.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = FOLDER_FPS) -> None:
        """
        Raises:
            ImageFileError: the folder holds no image.
        """
        super().__init__()
        self.name = os.fspath(path)
        self.fps = fps
        self._paths = sorted(find_images(path), key=lambda file: _natural(file.name))
        self.count = len(self._paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        size: tuple[int, ...] | None = None
        for path in self._paths:
            try:
                frame = read_image(str(path))
            except SampleError as error:
                self.problems.append(str(error))
                continue
            if size is not None and frame.shape != size:
                self.problems.append(
                    f"The frame '{path}' is {frame.shape[1]}x{frame.shape[0]} in a video of {size[1]}x{size[0]}."
                )
                continue
            size = frame.shape
            yield frame


def open_video(path: str | os.PathLike[str]) -> VideoSource:
    """A video file or a folder of frames.

    Raises:
        UserError: it does not exist, holds no frame or cannot be decoded.
    """
    return FrameFolder(path) if os.path.isdir(os.path.expanduser(path)) else VideoFile(path)


class VideoWriter:
    """Writes frames of one size into a video file, which appears whole or not at all.

    Use it as a context manager: leaving it normally puts the file in its place, leaving it by an exception removes what
    was written. Frames of odd height or width, which most codecs refuse, get one white row or column more.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        """
        Args:
            path: .mp4, .m4v, .mov or .mkv (MPEG-4), or .avi (Motion JPEG).
            fps: frames per second; kept to three decimals, above 65.535 to two, above 655.35 to one.

        Raises:
            ImageFileError: another suffix, or the path is a folder.
        """
        self.path = Path(os.path.expanduser(path))
        suffix = self.path.suffix.lower()
        if suffix not in VIDEO_CODECS:
            raise ImageFileError(
                f"cannot write '{path}': '{suffix}' is no video type known here, take one of {', '.join(VIDEO_CODECS)}."
            )
        if os.path.isdir(self.path):
            raise ImageFileError(f"cannot write '{path}': it is a folder, name a file in it.")
        self.fps = _writable_fps(fps)
        self.written = 0
        self._part = self.path.with_name(f".{secrets.token_hex(8)}.part{suffix}")
        self._codec = cv2.VideoWriter_fourcc(*VIDEO_CODECS[suffix])
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, frame: np.ndarray) -> None:
        """Append (H, W, 3) uint8 RGB.

        Raises:
            ImageFileError: the file or its folder cannot be made, or MPEG-4 takes no frames as large.
            ValueError: a frame of another size than the first one.
        """
        frame = _even(frame)
        if self._writer is None:
            self._size = frame.shape[:2]
            self._check_size()
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ImageFileError(
                    f"cannot write '{self.path}': folder '{self.path.parent}' cannot be made, "
                    f"{error.strerror or error}."
                ) from error
            _quiet()
            self._writer = cv2.VideoWriter(str(self._part), self._codec, self.fps, self._size[::-1])
            if not self._writer.isOpened():
                self._writer = None
                raise ImageFileError(
                    f"cannot write '{self.path}': the folder cannot be written, or this OpenCV has no encoder for "
                    f"{self.path.suffix}."
                )
        if frame.shape[:2] != self._size:
            raise ValueError(f"a frame of {frame.shape[:2]} in a video of {self._size} (height, width).")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.written += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.release()
                if kind is None:
                    self._check_written()
                    self._put_in_place()
        finally:
            if self._part.exists():
                self._part.unlink()

    def _check_size(self) -> None:
        """OpenCV only says that it did not work."""
        height, width = self._size
        if VIDEO_CODECS[self.path.suffix.lower()] == "mp4v" and max(height, width) > _LONGEST_SIDE:
            raise ImageFileError(
                f"cannot write '{self.path}': MPEG-4 has no more than {_LONGEST_SIDE} pixels a side, and the frames "
                f"are {width}x{height}: take .avi, or smaller frames."
            )

    def _put_in_place(self) -> None:
        try:
            os.replace(self._part, self.path)
        except OSError as error:
            raise ImageFileError(f"cannot write '{self.path}': {error.strerror or error}.") from error

    def _check_written(self) -> None:
        """OpenCV says nothing when a disk is full."""
        capture = _capture(str(self._part))
        found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if found < self.written:
            raise ImageFileError(
                f"cannot write '{self.path}': {found} of {self.written} frames arrived, is the disk full?"
            )


def _writable_fps(fps: float) -> float:
    """With as many decimals as the encoder takes: OpenCV gives it a decimal fraction, of up to three of them."""
    rounded = ((round(fps, places), 10**places) for places in (3, 2, 1, 0))
    return next((value for value, parts in rounded if value * parts <= _MOST_TICKS), fps)


def _capture(path: str) -> cv2.VideoCapture:
    _quiet()
    # Other backends would take a picture for the first of a numbered series.
    has_ffmpeg = cv2.CAP_FFMPEG in cv2.videoio_registry.getBackends()
    return cv2.VideoCapture(path, cv2.CAP_FFMPEG if has_ffmpeg else cv2.CAP_ANY)


def _quiet() -> None:
    """What goes wrong is said in one sentence here; OpenCV's and FFmpeg's own lines would stand before it."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _even(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    if not height % 2 and not width % 2:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
