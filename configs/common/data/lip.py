"""LIP with CE2P's augmentation; tested at 473x473, answers in the images' own size.

`RandomFlip` swaps left and right parts: the mapper sees to it, by the `flip_pairs` of the data set.
"""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from omegaconf import OmegaConf

from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts
from ccnet_d2.data.transforms import RandomScaleCrop, ResizeTo
from ccnet_d2.evaluation import LIPEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="lip_sem_seg_train"),
    mapper=L(SemSegMapper)(
        is_train=True,
        augmentations=[
            L(RandomScaleCrop)(
                crop_size=[473, 473],
                scale_choices=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
            ),
            L(T.RandomFlip)(horizontal=True),
        ],
        dataset_names="${..dataset.names}",
        image_format="RGB",
    ),
    total_batch_size=40,
    aspect_ratio_grouping=False,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="lip_sem_seg_val"),
    mapper=L(SemSegMapper)(
        is_train=False,
        augmentations=[L(ResizeTo)(height=473, width=473)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(LIPEvaluator)(dataset_name="${..test.dataset.names}")
