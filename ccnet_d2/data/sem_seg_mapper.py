"""From a Detectron2 data set dict to what a semantic segmentation model takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T

from ccnet_d2.data.catalog import checked_flip_pairs, classes_of, flip_pairs_of
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.image_files import check_label_size, check_record_size, read_image, read_label
from ccnet_d2.data.transforms.mirror import is_mirroring, swap_labels
from ccnet_d2.data.transforms.outside import outside_of
from ccnet_d2.errors import ARGUMENT_FAULTS, UserError
from ccnet_d2.wording import first_line

__all__ = ["IGNORE_LABEL", "LabelMap", "SemSegMapper"]

IGNORE_LABEL = 255
"""The value that void has in what the mapper returns, whatever it is in the files."""

logger = logging.getLogger(__name__)

_IMAGE_FAULTS = (ValueError, cv2.error)
"""What augmentations raise for images that they do not suit."""

_AUGMENTATION_FAULTS = (*_IMAGE_FAULTS, *ARGUMENT_FAULTS)
"""The same, and what they raise for values of their own that they were not made for."""


class LabelMap:
    """Checks the values of label maps and gives void the value :data:`IGNORE_LABEL`.

    Args:
        num_classes: K; values 0 to K - 1 are classes.
        ignore_label: value of void in the files.
    """

    def __init__(self, num_classes: int, ignore_label: int = IGNORE_LABEL) -> None:
        if not 1 <= num_classes <= IGNORE_LABEL:
            raise DatasetError(
                f"num_classes is {num_classes}, but 1 to {IGNORE_LABEL} classes can be told apart."
            )
        if 0 <= ignore_label < num_classes:
            raise DatasetError(f"ignore_label {ignore_label} is one of the {num_classes} classes.")
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        # What each 8-bit value becomes; values that must not occur are caught before.
        self._table = np.arange(256, dtype=np.uint8)
        if 0 <= ignore_label < 256:
            self._table[ignore_label] = IGNORE_LABEL

    def bad_values(self, label: np.ndarray) -> list[int]:
        """Values in `label`, (H, W) of any integer type, that are neither a class nor void, in order."""
        if label.dtype == np.uint8:
            counts = cv2.calcHist([label], [0], None, [256], [0, 256]).reshape(-1)
            values = np.flatnonzero(counts)
        else:
            values = np.unique(label)
        bad = (values < 0) | (values >= self.num_classes)
        return [int(value) for value in values[bad & (values != self.ignore_label)]]

    def __call__(self, label: np.ndarray, path: str) -> np.ndarray:
        """Check `label`, (H, W) read from `path`, and return it as uint8 with void = 255.

        Raises:
            SampleError: it holds a value that is neither a class nor void.
        """
        bad = self.bad_values(label)
        if bad:
            others = f" (and {len(bad) - 1} other such values)" if len(bad) > 1 else ""
            raise SampleError(
                f"The label map '{path}' holds the value {bad[0]}{others}, but classes are 0 to "
                f"{self.num_classes - 1} and void is {self.ignore_label}.",
                path,
            )
        if label.dtype != np.uint8:
            return np.where(label == self.ignore_label, IGNORE_LABEL, label).astype(np.uint8)
        return label if self.ignore_label == IGNORE_LABEL else cv2.LUT(label, self._table)


class SemSegMapper:
    """Reads, checks and augments one sample; for Detectron2's ``build_detection_{train,test}_loader``.

    Args:
        is_train: whether labels are read. Without it the result has no ``sem_seg``, as evaluators read the
            label files themselves.
        augmentations: Detectron2 augmentations or transforms, applied in order to image and label map.
        dataset_names: registered data sets from which the classes and the ignored label are taken.
        num_classes: K, if `dataset_names` is not given; with it, the K of the model, which has to be theirs.
        ignore_label: value of void in the label files; default: that of the data sets, else 255.
        image_format: ``"RGB"`` or ``"BGR"``.
        flip_pairs: pairs of classes that change places whenever the augmentations, be it by `RandomFlip` or any other
            of Detectron2's, mirror the image (left arm and right arm); default: those of the data sets.

    Returns (on call):
        dict: the sample's own entries (``file_name``, ``image_id``, …) and
            image: (3, H', W') tensor, uint8 unless an augmentation made it float32;
            sem_seg: (H', W') long tensor with classes 0 to K - 1 and void 255 (training only), void also where
                augmentations leave the image, which Detectron2's fill with class 0;
            height, width: size of the image in the file.

    Raises:
        DatasetError: unknown data set, or neither data sets nor classes given, or `flip_pairs` are no pairs of classes;
            on call, if an augmentation fails whatever the image is.
        SampleError: on call, if image or label map are unusable or do not fit together.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        dataset_names: str | Sequence[str] | None = None,
        num_classes: int | None = None,
        ignore_label: int | None = None,
        image_format: str = "RGB",
        flip_pairs: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if image_format not in ("RGB", "BGR"):
            raise DatasetError(f"image_format is '{image_format}', but only 'RGB' and 'BGR' are known.")
        if dataset_names is not None:
            classes, registered_ignore = classes_of(dataset_names)
            if num_classes is not None and num_classes != len(classes):
                raise DatasetError(
                    f"num_classes is {num_classes}, but the data set has {len(classes)} classes."
                )
            num_classes = len(classes)
            ignore_label = registered_ignore if ignore_label is None else ignore_label
            flip_pairs = flip_pairs_of(dataset_names) if flip_pairs is None else flip_pairs
        elif num_classes is None and is_train:
            raise DatasetError("SemSegMapper needs dataset_names or num_classes to check label maps.")
        self.is_train = is_train
        self.image_format = image_format
        self.flip_pairs = checked_flip_pairs(flip_pairs or (), num_classes, "flip_pairs")
        self.augmentations = T.AugmentationList(list(augmentations))
        self.label_map = (
            LabelMap(num_classes, IGNORE_LABEL if ignore_label is None else ignore_label)
            if num_classes is not None
            else None
        )
        logger.info("Augmentations for %s: %s", "training" if is_train else "test", self.augmentations)

    def _read_label(self, dataset_dict: dict[str, Any], image: np.ndarray) -> np.ndarray:
        file_name = dataset_dict["file_name"]
        path = dataset_dict.get("sem_seg_file_name")
        if path is None:
            raise SampleError(
                f"The image '{file_name}' is in the training set without a label map.", file_name
            )
        label = read_label(path)
        check_label_size(label, path, image, file_name)
        assert self.label_map is not None
        return self.label_map(label, path)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            # The workers are the parallelism; OpenCV's own threads would only compete with them.
            cv2.setNumThreads(0)
        file_name = dataset_dict["file_name"]
        image = read_image(file_name, self.image_format)
        height, width = image.shape[:2]
        check_record_size(dataset_dict, image)
        label = self._read_label(dataset_dict, image) if self.is_train else None

        augmented = T.AugInput(image, sem_seg=label)
        transforms = self._augment(augmented, file_name)
        sample = {key: value for key, value in dataset_dict.items() if key != "sem_seg_file_name"}
        sample.update(height=height, width=width)
        # Not ascontiguousarray, which leaves a mirrored image of one pixel its negative strides.
        sample["image"] = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy())
        if augmented.sem_seg is not None:
            (sem_seg,) = self._completed([augmented.sem_seg], transforms, height, width)
            sample["sem_seg"] = torch.from_numpy(sem_seg.astype(np.int64))
        return sample

    def _augment(self, augmented: T.AugInput, path: str) -> T.TransformList:
        """Apply the augmentations in place, as Detectron2's list of them does, and return what they did."""
        transforms = []
        height, width = augmented.image.shape[:2]
        for augmentation in self.augmentations.augs:
            try:
                transforms.append(augmentation(augmented))
            except UserError:
                raise
            except _AUGMENTATION_FAULTS as error:
                reason = first_line(error) or type(error).__name__
                message = (
                    f"The image '{path}', {width}x{height}, cannot be augmented by "
                    f"{str(augmentation).splitlines()[0]}: {reason}."
                )
                if isinstance(error, _IMAGE_FAULTS):
                    raise SampleError(message, path) from error
                raise DatasetError(message) from error
        return T.TransformList(transforms)

    def _completed(
        self, labels: Sequence[np.ndarray], transforms: T.Transform, height: int, width: int
    ) -> list[np.ndarray]:
        """Transformed label maps of images of height x width, with what a transform does not know of classes: void is
        beside the image, and the classes that a mirror swaps are swapped."""
        outside = outside_of(transforms, height, width)
        completed = [np.where(outside, IGNORE_LABEL, label) for label in labels]
        if self.flip_pairs and is_mirroring(transforms, height, width):
            completed = [swap_labels(label, self.flip_pairs) for label in completed]
        return completed
