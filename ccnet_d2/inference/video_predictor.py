"""Predictions for the frames of a video, in order: frame by frame, or in clips for models of clips.

Shapes: T frames of a clip, S frames between the starts of clips, K classes, h w size of the network input, H W size of
a frame.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling import CCNet3D

from .clips import WholeClip
from .images import as_rgb
from .label_bands import LabelBands
from .mode import WholeImage
from .predictor import Prediction, Predictor

__all__ = ["ClipMerger", "VideoPredictor"]


class ClipMerger:
    """Runs clips of T frames that start every S frames, and averages the logits of frames that several clips hold.

    Frames go in one by one and answers come out in order as soon as no later clip holds them. At most 2T - 1 frames and
    the logits of T are kept, however long the video is.
    """

    def __init__(self, segment: Callable[[list[Tensor]], Tensor], length: int, stride: int) -> None:
        """
        Args:
            segment: T frames (3, h, w) -> logits (T, K, h, w); also called with fewer frames at the end of a video that
                is shorter than a clip.
            length: T.
            stride: S, 1 to T.

        Raises:
            UserError: a number out of range.
        """
        if length < 1:
            raise UserError(f"a clip of {length} frames: give a length of at least 1.")
        if not 1 <= stride <= length:
            raise UserError(
                f"clips of {length} frames cannot start every {stride} frames: give 1 to {length}."
            )
        self._segment = segment
        self.length = length
        self.stride = stride
        self._frames: list[Tensor] = []  # not answered yet
        self._sums: list[Tensor] = []  # of the logits of the first of them
        self._counts: list[int] = []
        self._answered: deque[Tensor] = deque(maxlen=length - 1)  # context for the last clip

    def push(self, frame: Tensor) -> list[Tensor]:
        """Add a frame (3, h, w); returns the logits (K, h, w) of the frames that are finished by it, in order."""
        self._frames.append(frame)
        if len(self._frames) < self.length:
            return []
        self._add(self._segment(self._frames))
        return [self._pop() for _ in range(self.stride)]

    def finish(self) -> list[Tensor]:
        """No frame follows: the logits of the frames that are left.

        If frames are left that no clip holds yet, a last clip is moved back to end with the video.
        """
        if len(self._sums) < len(self._frames):
            missing = self.length - len(self._frames)
            before = list(self._answered)[-missing:] if missing else []
            self._add(self._segment(before + self._frames)[len(before) :])
        return [self._pop() for _ in range(len(self._frames))]

    def _add(self, logits: Tensor) -> None:
        for index, one in enumerate(logits):
            if index < len(self._sums):
                self._sums[index] = self._sums[index] + one
                self._counts[index] += 1
            else:
                # A copy: a view would keep the logits of the whole clip alive.
                self._sums.append(one.clone())
                self._counts.append(1)

    def _pop(self) -> Tensor:
        self._answered.append(self._frames.pop(0))
        return self._sums.pop(0) / self._counts.pop(0)


class VideoPredictor(Predictor):
    """A `Predictor` that also segments videos.

    Example:
        >>> predictor = VideoPredictor("camvid/ccnet3d_T5_R_18_D8_half.py", "model_final.pth")  # doctest: +SKIP
        >>> for prediction in predictor.video(open_video("drive.mp4")):  # doctest: +SKIP
        ...     prediction.labels
    """

    def __init__(
        self,
        model: nn.Module | DictConfig | str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        clip_length: int | None = None,
        clip_stride: int | None = None,
        clip_step: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model, checkpoint: see `Predictor`.
            clip_length: T, for models of clips; default: that of a run's test clips.
            clip_stride: frames (of the clip) between the starts of clips; default: half a clip, so that each frame is
                in two clips or more.
            clip_step: frames of the video between those of a clip; default: 1.
            options: further arguments of `Predictor`.

        Raises:
            UserError: as `Predictor`; clip options for a model of single frames; a clip length that is not known; a
                test mode other than the whole clip.
        """
        if isinstance(model, str | os.PathLike):
            model = get_config(os.fspath(model))
        super().__init__(model, checkpoint, **options)
        self.takes_clips = isinstance(self.model, CCNet3D)
        self.clip_length, self.clip_stride, self.clip_step = 1, 1, 1
        if not self.takes_clips:
            given = {"clip length": clip_length, "clip stride": clip_stride, "clip step": clip_step}
            for name, value in given.items():
                if value is not None:
                    raise UserError(
                        f"a {name} of {value} was given, but {type(self.model).__name__} segments single frames: leave "
                        "it out, or take a CCNet3D run."
                    )
            return
        if not isinstance(self.mode, WholeImage):
            raise UserError(
                f"{type(self.model).__name__} runs on whole clips, not in the test mode {type(self.mode).__name__}: "
                "leave the mode out."
            )
        if not isinstance(self.mode, WholeClip):
            self.mode = WholeClip(align_corners=self.mode.align_corners).bind(self.model)
        if clip_length is None and isinstance(model, DictConfig):
            configured = OmegaConf.select(model, "dataloader.test.dataset")
            clip_length = None if configured is None else configured.get("length")
        if clip_length is None:
            raise UserError("how many frames a clip has is not known: give a clip length, such as 5.")
        self.clip_length = clip_length
        self.clip_stride = max(-(-clip_length // 2), 1) if clip_stride is None else clip_stride
        self.clip_step = 1 if clip_step is None else clip_step
        if self.clip_step < 1:
            raise UserError(f"frames of a clip {clip_step} apart: give a clip step of at least 1.")
        self._merger()  # refuses what it cannot do before a video is opened

    def video(self, frames: Iterable[np.ndarray | Any]) -> Iterator[Prediction]:
        """Segment frames in their order; they are read as they are needed.

        With a clip step of n the frames 0, n, 2n, ... make clips, the frames 1, n + 1, ... others, and so on. Memory is
        that of 2T frames and T answers for each of these n streams, whatever the video's length.

        Args:
            frames: arrays or Pillow images as `Predictor.__call__` takes them, of one size.

        Yields:
            A prediction without logits for every frame.
        """
        if not self.takes_clips:
            for frame in frames:
                yield self(frame, labels_only=True)
            return
        streams = [self._merger() for _ in range(self.clip_step)]
        waiting: deque[np.ndarray] = deque()  # frames without an answer, in order
        answers: list[deque[Tensor]] = [deque() for _ in streams]
        turn = 0  # the stream whose answer is due
        for number, frame in enumerate(frames):
            stream = number % self.clip_step
            rgb = as_rgb(frame)
            waiting.append(rgb)
            answers[stream].extend(streams[stream].push(self._inputs(rgb)["image"]))
            while answers[turn]:
                yield self._prediction(waiting.popleft(), answers[turn].popleft())
                turn = (turn + 1) % self.clip_step
        for stream, merger in enumerate(streams):
            answers[stream].extend(merger.finish())
        while waiting:
            yield self._prediction(waiting.popleft(), answers[turn].popleft())
            turn = (turn + 1) % self.clip_step

    def _merger(self) -> ClipMerger:
        return ClipMerger(self._segment_clip, self.clip_length, self.clip_stride)

    def _segment_clip(self, frames: list[Tensor]) -> Tensor:
        """T frames (3, h, w) -> logits (T, K, h, w)."""
        clip = torch.stack(frames)
        height, width = clip.shape[-2:]
        return self.logits([{"image": clip, "height": height, "width": width}])

    def _prediction(self, rgb: np.ndarray, logits: Tensor) -> Prediction:
        bands = LabelBands(
            (logits.shape[-2], logits.shape[-1]),
            (rgb.shape[0], rgb.shape[1]),
            align_corners=self.mode.resize_aligned(),
        )
        bands.push(logits)
        classes = self._class_table(logits.shape[0], bands.labels)
        return Prediction(rgb, bands.labels.numpy(), None, classes)
