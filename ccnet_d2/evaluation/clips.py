"""Evaluation of clips, frame by frame."""

from collections.abc import Sequence
from typing import Any

from .sem_seg import CheckedSemSegEvaluator


class ClipSemSegEvaluator(CheckedSemSegEvaluator):
    """`CheckedSemSegEvaluator` on clips: each frame that a clip answers counts as an image.

    The metrics are those of the single frames of the data set, whatever clips they were cut into, provided that the
    clips answer every frame once, as those of `get_covering_clip_dicts` do.
    """

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            inputs: clips with `frames`, a list of T dicts with `file_name`, and `answers`, the indices of those that
                count (all unless given); or single images.
            outputs: {"sem_seg": (T, K, H, W) logits} for each, or (K, H, W) for an image.
        """
        for clip, output in zip(inputs, outputs, strict=True):
            if "frames" not in clip:
                super().process([clip], [output])
                continue
            frames = clip["frames"]
            for index in clip.get("answers", range(len(frames))):
                super().process([frames[index]], [{"sem_seg": output["sem_seg"][index]}])
