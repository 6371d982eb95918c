"""PASCAL VOC 2012 with the annotations of SBD with mmsegmentation's augmentation; tested with the short side at 512."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import SemSegEvaluator
from omegaconf import OmegaConf

from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts
from ccnet_d2.data.transforms import ResizeToFit

from ..augmentations import scale_crop_flip_distort

dataloader = OmegaConf.create()

dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="voc12_sem_seg_train_aug"),
    mapper=L(SemSegMapper)(
        is_train=True,
        augmentations=scale_crop_flip_distort,
        dataset_names="${..dataset.names}",
        image_format="RGB",
    ),
    total_batch_size=16,
    aspect_ratio_grouping=False,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="voc12_sem_seg_val"),
    mapper=L(SemSegMapper)(
        is_train=False,
        augmentations=[L(ResizeToFit)(long_side=2048, short_side=512)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(SemSegEvaluator)(dataset_name="${..test.dataset.names}")
