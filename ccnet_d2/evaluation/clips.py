"""Evaluation of clips, frame by frame."""

from collections.abc import Sequence
from typing import Any

from .sem_seg import CheckedSemSegEvaluator


class ClipSemSegEvaluator(CheckedSemSegEvaluator):
    """`CheckedSemSegEvaluator` on clips: each frame that a clip answers, and that has a label map, counts as an image.

    The metrics are those of the single frames of the data set, whatever clips they were cut into, provided that the
    clips answer every frame once, as those of `get_covering_clip_dicts` do.
    """

    _all_labelled = False

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            inputs: clips with `frames`, a list of T dicts with `file_name`, and `answers`, the indices of those that
                count (all unless given); or single images.
            outputs: {"sem_seg": (T, K, H, W) logits} for each, or (K, H, W) for an image.
        """
        for clip, output in zip(inputs, outputs, strict=True):
            if "frames" in clip:
                frames = clip["frames"]
                answered = [
                    (frames[index], output["sem_seg"][index])
                    for index in clip.get("answers", range(len(frames)))
                ]
            else:
                answered = [(clip, output["sem_seg"])]
            for frame, answer in answered:
                if self._label_file(frame["file_name"]) is not None:
                    super().process([frame], [{"sem_seg": answer}])
