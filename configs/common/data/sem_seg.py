"""The dataloader that every semantic segmentation data set here has."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from omegaconf import DictConfig, OmegaConf

from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts
from ccnet_d2.evaluation import CheckedSemSegEvaluator


def sem_seg_dataloader(
    train: str,
    test: str,
    *,
    augmentations: Sequence[Any],
    test_augmentations: Sequence[Any] = (),
    batch_size: int,
    evaluator: Any = CheckedSemSegEvaluator,
    num_workers: int = 4,
    test_workers: int | None = None,
) -> DictConfig:
    """`train`, `test` and `evaluator` of a run, all of which read the data sets' names from one place each.

    Args:
        train, test: names of registered data sets.
        augmentations, test_augmentations: of the two.
        batch_size: training images on all GPUs together.
        evaluator: class of the evaluator.
        num_workers, test_workers: processes that load; the same for both unless given.
    """
    dataloader = OmegaConf.create()
    dataloader.train = L(build_detection_train_loader)(
        dataset=L(get_sem_seg_dataset_dicts)(names=train),
        mapper=L(SemSegMapper)(
            is_train=True,
            augmentations=list(augmentations),
            dataset_names="${..dataset.names}",
            image_format="RGB",
        ),
        total_batch_size=batch_size,
        aspect_ratio_grouping=False,
        num_workers=num_workers,
    )
    dataloader.test = L(build_detection_test_loader)(
        dataset=L(get_sem_seg_dataset_dicts)(names=test),
        mapper=L(SemSegMapper)(
            is_train=False,
            augmentations=list(test_augmentations),
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=num_workers if test_workers is None else test_workers,
    )
    dataloader.evaluator = L(evaluator)(dataset_name="${..test.dataset.names}")
    return dataloader
