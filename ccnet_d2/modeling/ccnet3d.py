"""CCNet3D: the network of CCNet on every frame of a clip, and criss-cross attention across the frames."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from ccnet_d2.errors import UserError
from ccnet_d2.layers.clip_rcca import clips_of

from .ccnet import CCNet


@META_ARCH_REGISTRY.register()
class CCNet3D(CCNet):
    """Segments every frame of a clip of any length.

    Backbone and head see single frames; `ClipRCCA` layers (the head's context "rcca3d") see the clip, as
    (B, C, T, h, w). Parameters, and their names, are those of `CCNet`: its checkpoints load here, and on single images
    the two answer alike (with the same number of loops).

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`, Sec. 3.5 and 4.7.
    """

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: one dict a clip:
                "image": (T, 3, h, w) tensor, uint8 or float, 0-255, channels as `input_format`; or (3, h, w), an
                    image, which is a clip of one frame;
                "sem_seg": (T, h, w) integer labels, in training (or (h, w) for an image); frames without loss hold
                    the ignored label;
                "height", "width": size of the prediction wanted, in inference; the clip's own unless given.

        Returns:
            In training a dict of scalar losses, over all labelled pixels of all frames; in inference for each clip
            {"sem_seg": (T, K, height, width) logits}, and (K, height, width) for an image.

        Raises:
            UserError: in training, clips of different lengths.
        """
        lengths = [_length(x["image"]) for x in batched_inputs]
        if self.training:
            if len(set(lengths)) > 1:
                raise UserError(
                    f"clips of {min(lengths)} and of {max(lengths)} frames in one batch: train on clips of one "
                    "length, as get_clip_dataset_dicts makes them."
                )
            frames = [frame for x in batched_inputs for frame in _frames(x)]
            with clips_of(self, lengths[0]):
                return super().forward(frames)
        answers: list[dict[str, Tensor]] = []
        for length, group in groupby(zip(lengths, batched_inputs, strict=True), key=lambda pair: pair[0]):
            answers += self._segment([x for _, x in group], length)
        return answers

    def _segment(self, clips: list[dict], length: int) -> list[dict[str, Tensor]]:
        """Answers for clips of one length."""
        with clips_of(self, length):
            results = super().forward([frame for clip in clips for frame in _frames(clip)])
        assert isinstance(results, list)
        logits = [result["sem_seg"] for result in results]
        answers = []
        for i, clip in enumerate(clips):
            if clip["image"].dim() == 3:
                answers.append({"sem_seg": logits[i * length]})
            else:
                answers.append({"sem_seg": torch.stack(logits[i * length : (i + 1) * length])})
        return answers


def _length(image: Tensor) -> int:
    if image.dim() not in (3, 4) or image.shape[0] == 0:
        raise ValueError(
            f"'image' must be a clip (T, 3, h, w) or an image (3, h, w), got {tuple(image.shape)}."
        )
    return image.shape[0] if image.dim() == 4 else 1


def _frames(clip: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The clip's frames as inputs of a model of single images."""
    rest = {key: clip[key] for key in ("height", "width") if key in clip}
    if clip["image"].dim() == 3:
        yield {**rest, **{key: clip[key] for key in ("image", "sem_seg") if key in clip}}
        return
    for t, image in enumerate(clip["image"]):
        frame = {**rest, "image": image}
        if "sem_seg" in clip:
            frame["sem_seg"] = clip["sem_seg"][t]
        yield frame
