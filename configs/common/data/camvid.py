"""CamVid in two dimensions, at the 960x720 of its original release, to which smaller copies are enlarged."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.evaluation import SemSegEvaluator
from omegaconf import OmegaConf

from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts
from ccnet_d2.data.transforms import RandomScaleCrop, ResizeToFit

dataloader = OmegaConf.create()

dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="camvid_sem_seg_train"),
    mapper=L(SemSegMapper)(
        is_train=True,
        augmentations=[
            L(RandomScaleCrop)(crop_size=[504, 504], scale_range=[0.75, 2.0], base_size=[960, 720]),
            L(T.RandomFlip)(horizontal=True),
        ],
        dataset_names="${..dataset.names}",
        image_format="RGB",
    ),
    total_batch_size=8,
    aspect_ratio_grouping=False,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="camvid_sem_seg_val"),
    mapper=L(SemSegMapper)(
        is_train=False, augmentations=[L(ResizeToFit)(long_side=960, short_side=720)], image_format="RGB"
    ),
    num_workers=2,
)

dataloader.evaluator = L(SemSegEvaluator)(dataset_name="${..test.dataset.names}")
