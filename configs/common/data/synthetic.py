"""The synthetic set: noise images whose objects take their class from a cue elsewhere in the image."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.evaluation import SemSegEvaluator
from omegaconf import OmegaConf

from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts

dataloader = OmegaConf.create()

dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="ccnet_synthetic_train"),
    mapper=L(SemSegMapper)(
        is_train=True,
        augmentations=[L(T.RandomFlip)(horizontal=True), L(T.RandomFlip)(horizontal=False, vertical=True)],
        dataset_names="${..dataset.names}",
        image_format="RGB",
    ),
    total_batch_size=16,
    aspect_ratio_grouping=False,
    num_workers=0,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="ccnet_synthetic_val"),
    mapper=L(SemSegMapper)(is_train=False, augmentations=[], image_format="${...train.mapper.image_format}"),
    num_workers=0,
)

dataloader.evaluator = L(SemSegEvaluator)(dataset_name="${..test.dataset.names}")
