"""Evaluation of semantic segmentation at the images' own size, strict about what it counts."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ccnet_d2.data.catalog import check_registered, classes_of, get_sem_seg_dataset_dicts
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.image_files import read_label
from ccnet_d2.data.sem_seg_mapper import IGNORE_LABEL, LabelMap

__all__ = ["CheckedSemSegEvaluator"]

logger = logging.getLogger(__name__)


class CheckedSemSegEvaluator(DatasetEvaluator):
    """mIoU, frequency weighted IoU and accuracies, and each class's, under the names of Detectron2's `SemSegEvaluator`.

    The numbers are the same too, but three things differ:

    - Label files are read and checked as in training. Detectron2's takes a label that is neither a class nor void for
      another class, and a label map of another shape with as many pixels for the right one, without a word.
    - The means are over the classes that occur in the label maps. Detectron2 0.5 counts a class that only the answers
      have as an IoU of 0, and later ones leave it out.
    - Answers are counted and not kept, where Detectron2's encodes each as JSON.

    Answers that are not finite are counted as there, as some class, and the log tells of them.
    """

    _all_labelled = True

    def __init__(self, dataset_name: str | Sequence[str], *, distributed: bool = True) -> None:
        """
        Args:
            dataset_name: registered name, or several of the same classes.
            distributed: add up what all processes counted. The results are then the main process's.

        Raises:
            DatasetError: the data set is unknown or cannot be listed, or there is an image with different label maps.
        """
        self._dataset_name = dataset_name
        self.classes, ignore_label = classes_of(dataset_name)
        self._label_map = LabelMap(len(self.classes), ignore_label)
        records = get_sem_seg_dataset_dicts(dataset_name, labelled=self._all_labelled)
        self._label_files: dict[str, str | None] = {}
        for record in records:
            image, label = record["file_name"], record.get("sem_seg_file_name")
            if self._label_files.setdefault(image, label) != label:
                names = [repr(name) for name in check_registered(dataset_name)]
                which, advice = "Data set {} has", "keep one of them"
                if len(names) > 1:
                    which, advice = "Data sets {} have", "evaluate on one after the other"
                which = which.format(", ".join(names))
                raise DatasetError(f"{which} '{image}' with different label maps: {advice}.")
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        classes = len(self.classes)
        # Row: label, column: prediction.
        self.confusion = np.zeros((classes, classes), np.int64)
        self._answers = 0
        self._not_finite: list[str] = []  # images

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with `file_name`, as the data set has them.
            outputs: {"sem_seg": (K, H, W) logits} for each, H and W those of the file.

        Raises:
            DatasetError: an answer has another number of classes than the data set, or is for an image that is none
                of it.
            SampleError: a label map cannot be used, does not have the answer's size, or holds a value that is neither
                a class nor void.
        """
        classes = len(self.classes)
        for given, output in zip(inputs, outputs, strict=True):
            if len(output["sem_seg"]) != classes:
                raise DatasetError(
                    f"The model answers with {len(output['sem_seg'])} classes, but the data set has {classes}: "
                    f"model.sem_seg_head.num_classes (MODEL.SEM_SEG_HEAD.NUM_CLASSES) has to be {classes}."
                )
            best, answer = output["sem_seg"].max(dim=0)
            finite = best.isfinite().all()  # NaN is the largest
            answer = answer.cpu().numpy()
            self._answers += 1
            if not finite:
                self._not_finite.append(given["file_name"])
            path = self._label_file(given["file_name"])
            label = self._label_map(read_label(path), path)
            if label.shape != answer.shape:
                raise SampleError(
                    f"The label map '{path}' is {label.shape[1]}x{label.shape[0]}, but the answer for "
                    f"'{given['file_name']}' is {answer.shape[1]}x{answer.shape[0]}.",
                    path,
                )
            valid = label != IGNORE_LABEL
            pairs = classes * label[valid].astype(np.int64) + answer[valid]
            self.confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def _label_file(self, image: str) -> str | None:
        """The image's label map, if it has one."""
        if image not in self._label_files:
            raise DatasetError(
                f"'{image}' is no image of the data set {self._dataset_name!r} that the evaluator was given: "
                "dataloader.evaluator.dataset_name has to be that of dataloader.test."
            )
        return self._label_files[image]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """`{"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", "ACC-<class>"}}` in percent, NaN for a class
        that does not occur; None on other processes than the main one."""
        confusion, answers, not_finite = self.confusion, self._answers, self._not_finite
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            counted = comm.all_gather((confusion, answers, not_finite))
            if not comm.is_main_process():
                return None
            confusion, answers = (sum(one[index] for one in counted) for index in (0, 1))
            not_finite = [image for one in counted for image in one[2]]
        if not_finite:
            logger.warning(
                "%s: answers for %d of %d images are not finite (NaN or infinite), the first that for '%s'; such "
                "pixels count as some class, so the numbers say little. The weights may be those of a training that "
                "diverged, or beyond the range of train.amp.",
                type(self).__name__,
                len(not_finite),
                answers,
                not_finite[0],
            )
        right = np.diag(confusion).astype(float)
        labelled, answered = confusion.sum(axis=1), confusion.sum(axis=0)
        occurs = labelled > 0
        missing = [name for name, there in zip(self.classes, occurs, strict=True) if not there]
        if missing:
            logger.warning(
                "%s: no pixel of %s; the means are over the other classes.", type(self).__name__, missing
            )
        accuracy = np.full(len(right), np.nan)
        iou = np.full(len(right), np.nan)
        accuracy[occurs] = right[occurs] / labelled[occurs]
        iou[occurs] = right[occurs] / (labelled + answered - right)[occurs]
        total = confusion.sum()
        values = OrderedDict(
            mIoU=100 * iou[occurs].mean() if total else np.nan,
            fwIoU=100 * (labelled * iou)[occurs].sum() / total if total else np.nan,
            mACC=100 * accuracy[occurs].mean() if total else np.nan,
            pACC=100 * right.sum() / total if total else np.nan,
        )
        values.update((f"IoU-{name}", 100 * value) for name, value in zip(self.classes, iou, strict=True))
        values.update(
            (f"ACC-{name}", 100 * value) for name, value in zip(self.classes, accuracy, strict=True)
        )
        return {"sem_seg": OrderedDict((key, float(value)) for key, value in values.items())}
