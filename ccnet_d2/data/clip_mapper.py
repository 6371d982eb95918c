"""From a clip's dict to what a model of clips takes.

Shapes: T frames of a clip, H' W' size after the augmentations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T

from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.image_files import read_image
from ccnet_d2.data.sem_seg_mapper import IGNORE_LABEL, SemSegMapper
from ccnet_d2.data.transforms.outside import steps_of

__all__ = ["ClipMapper"]

_NAMED_FRAMES = ("all", "first", "middle", "last")


class ClipMapper(SemSegMapper):
    """Reads, checks and augments one clip; for Detectron2's ``build_detection_{train,test}_loader``.

    Whatever an augmentation draws (scale, crop, flip, colours) holds for all frames of the clip. Frames without a label
    map, and those that pad a short sequence, carry no loss.

    Args:
        loss_frames: which frames carry loss in training: "all", "first", "middle", "last", or their indices in the
            clip (or the only one), negative ones counted from the end.
        is_train, augmentations, dataset_names, num_classes, ignore_label, image_format, flip_pairs: see
            `SemSegMapper`.

    Returns (on call):
        dict: the clip's own entries (``frames``, ``answers``, …) and
            image: (T, 3, H', W') tensor, uint8 unless an augmentation made it float32;
            sem_seg: (T, H', W') long tensor, 255 where a pixel or the whole frame carries no loss (training only);
            height, width: size of the frames in the files.
        A dict of a single image is mapped as `SemSegMapper` does.

    Raises:
        DatasetError: as `SemSegMapper`, or `loss_frames` names no frame; on call, if an augmentation mixes every frame
            with the gray values of one, as Detectron2's `RandomSaturation` would.
        SampleError: on call, if a frame is unusable, its label map does not fit it, frames differ in size, or none of
            the frames with loss is labelled.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        loss_frames: str | int | Sequence[int] = "all",
        dataset_names: str | Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_label: int | None = None,
        image_format: str = "RGB",
        flip_pairs: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(
            is_train,
            augmentations=augmentations,
            dataset_names=dataset_names,
            num_classes=num_classes,
            ignore_label=ignore_label,
            image_format=image_format,
            flip_pairs=flip_pairs,
        )
        if isinstance(loss_frames, int):
            loss_frames = [loss_frames]
        if isinstance(loss_frames, str) and loss_frames not in _NAMED_FRAMES:
            raise DatasetError(
                f"loss_frames is '{loss_frames}': give one of {', '.join(_NAMED_FRAMES)}, or a list of indices."
            )
        if not loss_frames:
            raise DatasetError("loss_frames is empty: at least one frame has to carry loss.")
        self.loss_frames = loss_frames if isinstance(loss_frames, str) else tuple(loss_frames)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See the class."""
        if "frames" not in dataset_dict:
            return super().__call__(dataset_dict)
        if torch.utils.data.get_worker_info() is not None:
            cv2.setNumThreads(0)  # the workers are the parallelism
        frames = dataset_dict["frames"]
        images = self._read_images(frames)
        labels: list[np.ndarray] | None
        # Augmentations that look at labels (crops that are to show several classes) see those of a frame with loss.
        if self.is_train:
            labels, shown = self._read_labels(frames, images)
        else:
            labels, shown = None, self._loss_indices(len(frames))[0]

        augmented = T.AugInput(images[shown], sem_seg=None if labels is None else labels[shown])
        transforms = self._augment(augmented, frames[shown]["file_name"])
        _check_same_for_every_frame(transforms)
        clip = dict(dataset_dict, height=images[0].shape[0], width=images[0].shape[1])
        clip["image"] = (
            _stacked([transforms.apply_image(image) for image in images]).permute(0, 3, 1, 2).contiguous()
        )
        if labels is not None:
            labels = [transforms.apply_segmentation(label) for label in labels]
            completed = self._completed(labels, transforms, clip["height"], clip["width"])
            clip["sem_seg"] = _stacked(completed).long()
        return clip

    def _read_images(self, frames: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        images = []
        for frame in frames:
            if not frame.get("repeated"):
                images.append(read_image(frame["file_name"], self.image_format))
            else:
                images.append(images[-1])
            if images[-1].shape != images[0].shape:
                (height, width), (first_height, first_width) = images[-1].shape[:2], images[0].shape[:2]
                raise SampleError(
                    f"The frame '{frame['file_name']}' is {width}x{height}, but the first frame of its clip, "
                    f"'{frames[0]['file_name']}', is {first_width}x{first_height}.",
                    frame["file_name"],
                )
        return images

    def _read_labels(
        self, frames: Sequence[dict[str, Any]], images: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], int]:
        """Label maps, void throughout where a frame carries no loss, and the index of the first that is read."""
        with_loss = self._loss_indices(len(frames))
        real = [index for index, frame in enumerate(frames) if not frame.get("repeated")]
        # In a short sequence the frames wanted may all be repetitions of its last one.
        with_loss = [index for index in with_loss if index in real] or real[-1:]
        labels = [np.full(image.shape[:2], IGNORE_LABEL, np.uint8) for image in images]
        labelled = [index for index in with_loss if frames[index].get("sem_seg_file_name") is not None]
        for index in labelled:
            labels[index] = self._read_label(frames[index], images[index])
        if not labelled:
            raise SampleError(
                f"The clip of {len(frames)} frames from '{frames[0]['file_name']}' has no label map for any frame that "
                f"carries loss (loss_frames={self.loss_frames!r}).",
                frames[0]["file_name"],
            )
        return labels, labelled[0]

    def _loss_indices(self, length: int) -> list[int]:
        """Indices, in order, of the frames with loss in a clip of so many frames."""
        named = {"all": range(length), "first": [0], "middle": [length // 2], "last": [length - 1]}
        if isinstance(self.loss_frames, str):
            return list(named[self.loss_frames])
        outside = [index for index in self.loss_frames if not -length <= index < length]
        if outside:
            raise DatasetError(f"loss_frames names frame {outside[0]}, but clips have {length} frames.")
        return sorted({index % length for index in self.loss_frames})


def _check_same_for_every_frame(transforms: T.Transform) -> None:
    """Refuse transforms that hold pixels of the frame they were made for: the others would show its ghost."""
    for step in steps_of(transforms):
        if isinstance(step, T.BlendTransform) and np.ndim(step.src_image) > 1:
            raise DatasetError(
                "An augmentation such as RandomSaturation mixes an image with its own gray values, which would be "
                "those of one frame in all frames of a clip: take ccnet_d2.data.transforms.RandomPhotometricDistortion."
            )


def _stacked(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
