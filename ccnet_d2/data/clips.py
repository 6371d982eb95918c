"""Clips: frames of one sequence in the order of time, from data sets of single labelled frames.

A clip is a Detectron2 dict with `frames`, a list of T ordinary dicts (`file_name`, `sem_seg_file_name`), in time order
and of one sequence. Which sequence a frame is of, and when it was taken, is read from its file's name.

Shapes: T frames of a clip.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ccnet_d2.data.catalog import get_sem_seg_dataset_dicts
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.windows import window_starts

__all__ = [
    "FRAME_PATTERN",
    "find_sequences",
    "get_clip_dataset_dicts",
    "get_covering_clip_dicts",
]

FRAME_PATTERN = r"(?P<sequence>.*?)[_-]?[A-Za-z]?(?P<frame>\d+)"
"""What the path of a frame, without its extension, looks like: 0001TP_006690 and Seq05VD_f00030 in CamVid."""


def find_sequences(
    samples: Sequence[dict[str, Any]], *, pattern: str = FRAME_PATTERN, max_gap: int | None = None
) -> list[list[dict[str, Any]]]:
    """Sort frames into sequences, each in the order of its frame numbers.

    Args:
        samples: Detectron2 dicts.
        pattern: regular expression with the groups `sequence` and `frame` (a number) that a path without its
            extension matches as a whole. Frames of different folders are of different sequences.
        max_gap: cut a sequence where frame numbers are further apart than this; default: never.

    Returns:
        Sequences by name, at least one frame each.

    Raises:
        DatasetError: the pattern is none, a file has no such name, two frames of a sequence have one number, or max_gap
            is below 1.
    """
    if max_gap is not None:
        _check_positive(max_gap=max_gap)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DatasetError(f"The pattern {pattern!r} is no regular expression: {error}.") from error
    if not {"sequence", "frame"} <= set(expression.groupindex):
        raise DatasetError(f"The pattern {pattern!r} has no groups 'sequence' and 'frame'.")
    sequences: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for sample in samples:
        path = sample["file_name"]
        folder, name = os.path.split(os.path.splitext(path)[0])
        match = expression.fullmatch(name)
        if match is None or not (match["frame"] or "").removeprefix("-").isdecimal():
            raise DatasetError(
                f"'{path}' does not tell sequence and frame number as {pattern!r} does: give another pattern."
            )
        frames = sequences.setdefault((folder, match["sequence"]), {})
        number = int(match["frame"])
        if number in frames:
            raise DatasetError(
                f"'{frames[number]['file_name']}' and '{path}' are both frame {number} of one sequence."
            )
        frames[number] = sample
    found = []
    for _, frames in sorted(sequences.items()):
        numbers = sorted(frames)
        found.append([frames[numbers[0]]])
        for before, number in pairwise(numbers):
            if max_gap is not None and number - before > max_gap:
                found.append([])
            found[-1].append(frames[number])
    return found


def get_clip_dataset_dicts(
    names: str | Sequence[str],
    *,
    length: int,
    steps: int | Sequence[int] = 1,
    stride: int = 1,
    pattern: str = FRAME_PATTERN,
    max_gap: int | None = None,
) -> list[dict[str, Any]]:
    """Clips to train on: from every start position of every sequence, T frames `step` apart.

    The sampler of the training loader draws among the clips, so every clip is as frequent as any other; with several
    `steps` it draws the step too. A sequence too short for T frames gives one clip in which its last frame is repeated;
    repeated frames carry no loss.

    Args:
        names: registered data sets of single frames, some of which may have no label map.
        length: T. 1 gives single frames in the format of clips.
        steps: distances between the frames of a clip, counted in frames of the data set (not of the video behind it).
        stride: distance between the starts of successive clips.
        pattern, max_gap: see `find_sequences`.

    Returns:
        Dicts with `frames`, `file_name` (of the first frame) and `image_id`.

    Raises:
        DatasetError: a data set is missing, a file has no frame number, or a number above is below 1.
    """
    steps = [steps] if isinstance(steps, int) else list(steps)
    _check_positive(length=length, stride=stride, **{f"steps[{i}]": step for i, step in enumerate(steps)})
    if not steps:
        raise DatasetError("steps is empty: give the distance between the frames of a clip, such as 1.")
    clips = []
    for sequence in find_sequences(
        get_sem_seg_dataset_dicts(names, labelled=False), pattern=pattern, max_gap=max_gap
    ):
        for step in steps:
            reach = (length - 1) * step + 1
            if len(sequence) < reach:
                if step == min(steps):
                    clips.append(_clip(_padded(sequence[::step], length)))
                continue
            for start in range(0, len(sequence) - reach + 1, stride):
                clips.append(_clip(sequence[start : start + reach : step]))
    return clips


def get_covering_clip_dicts(
    names: str | Sequence[str],
    *,
    length: int,
    step: int = 1,
    stride: int | None = None,
    pattern: str = FRAME_PATTERN,
    max_gap: int | None = None,
) -> list[dict[str, Any]]:
    """Clips to test on: together they hold every frame, and each frame is answered by exactly one of them.

    A sequence is cut into clips of T frames; the last one is moved back to end with the sequence. A frame that several
    clips hold is answered where it is farthest from the clip's ends. With `step` above 1 the frames 0, step, 2·step, …
    are cut into clips, then the frames 1, step + 1, …. A sequence shorter than T is one short clip.

    Args:
        names, length, pattern, max_gap: see `get_clip_dataset_dicts`.
        step: distance between the frames of a clip, counted in frames of the data set.
        stride: distance between the starts of successive clips, in frames of the clip; default: T, clips side by side.
            Smaller ones overlap, so that fewer frames are answered at the ends of clips, at more computation.

    Returns:
        Dicts as of `get_clip_dataset_dicts` with `answers`, the indices of the frames that count.

    Raises:
        DatasetError: as there, or stride is above T, which would leave out frames.
    """
    stride = length if stride is None else stride
    _check_positive(length=length, step=step, stride=stride)
    if stride > length:
        raise DatasetError(f"stride={stride} is above length={length}: frames would be left out.")
    clips = []
    for sequence in find_sequences(
        get_sem_seg_dataset_dicts(names, labelled=False), pattern=pattern, max_gap=max_gap
    ):
        for first in range(min(step, len(sequence))):
            frames = sequence[first::step]
            starts = window_starts(len(frames), length, stride)
            for start, answers in zip(starts, _answers(len(frames), length, starts), strict=True):
                if answers:
                    clips.append(_clip(frames[start : start + length]) | {"answers": answers})
    return clips


def _answers(count: int, length: int, starts: Sequence[int]) -> list[list[int]]:
    """For each clip the indices in it of the frames it answers."""
    answers: list[list[int]] = [[] for _ in starts]
    for frame in range(count):
        holding = [i for i, start in enumerate(starts) if start <= frame < start + length]
        best = max(holding, key=lambda i: min(frame - starts[i], starts[i] + length - 1 - frame))
        answers[best].append(frame - starts[best])
    return answers


def _padded(frames: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    return frames[:length] + [{**frames[-1], "repeated": True}] * (length - len(frames))


def _clip(frames: list[dict[str, Any]]) -> dict[str, Any]:
    name = os.path.splitext(os.path.basename(frames[0]["file_name"]))[0]
    return {"file_name": frames[0]["file_name"], "image_id": f"{name}+{len(frames)}", "frames": list(frames)}


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise DatasetError(f"{name} is {number}, but has to be at least 1.")
