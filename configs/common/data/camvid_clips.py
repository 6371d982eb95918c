"""CamVid in clips, at the 960x720 of its original release, to which smaller copies are enlarged.

Training draws T successive labelled frames (1 s apart) of one sequence; every frame carries loss. The validation
sequence is labelled 15 times a second: clips are taken `step` labelled frames apart there, so that a clip spans the
time it spans in training. Batches are counted in clips.
"""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from omegaconf import OmegaConf

from ccnet_d2.data import ClipMapper, get_clip_dataset_dicts, get_covering_clip_dicts
from ccnet_d2.data.transforms import RandomScaleCrop, ResizeToFit
from ccnet_d2.evaluation import ClipSemSegEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_detection_train_loader)(
    # Sequences are cut where labelled frames are more than 2 s apart.
    dataset=L(get_clip_dataset_dicts)(names="camvid_sem_seg_train", length=5, steps=[1], max_gap=60),
    mapper=L(ClipMapper)(
        is_train=True,
        loss_frames="all",
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
    dataset=L(get_covering_clip_dicts)(
        names="camvid_sem_seg_val", length="${...train.dataset.length}", step=15, max_gap=60
    ),
    mapper=L(ClipMapper)(
        is_train=False, augmentations=[L(ResizeToFit)(long_side=960, short_side=720)], image_format="RGB"
    ),
    num_workers=2,
)

dataloader.evaluator = L(ClipSemSegEvaluator)(dataset_name="${..test.dataset.names}")
