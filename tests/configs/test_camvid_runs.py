"""The full runs on CamVid have the numbers of the paper, and those chosen for it, which stand here a second time."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T

from ccnet_d2.model_zoo import get_config

CLIPS = {f"camvid/ccnet3d_T{length}_R_101_D8_504x504.py": length for length in (1, 5)}
RUNS = [*CLIPS, "camvid/ccnet_R_101_D8_504x504.py", "camvid/ccnet_R_50_D8_504x504.py"]


@pytest.mark.parametrize("name", RUNS)
def test_recipe(name):
    cfg = get_config(name)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (1e-2, 0.9, 1e-4)
    multiplier = instantiate(cfg.lr_multiplier)
    assert [multiplier(x) for x in (0.0, 0.3, 1.0)] == pytest.approx([1.0, 0.7**0.9, 0.0])
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (20000, 8)
    head = cfg.model.sem_seg_head
    assert (head.num_classes, head.align_corners, head.activation) == (11, True, "leaky_relu")
    crop, flip = instantiate(cfg.dataloader.train.mapper).augmentations.augs
    assert (crop.crop_size, crop.scale_range, crop.base_size) == ((504, 504), (0.75, 2.0), (960, 720))
    assert flip.prob == 0.5
    tested = T.AugInput(np.zeros((360, 480, 3), np.uint8))
    T.AugmentationList(instantiate(cfg.dataloader.test.mapper.augmentations))(tested)
    assert tested.image.shape[:2] == (720, 960)


@pytest.mark.parametrize("name", CLIPS)
def test_clips(name):
    cfg = get_config(name)
    train, test = cfg.dataloader.train.dataset, cfg.dataloader.test.dataset
    assert train.length == test.length == CLIPS[name]
    # Frames 1 s apart, as in training: the validation sequence is labelled 15 times a second.
    assert (list(train.steps), test.step, train.max_gap, test.max_gap) == ([1], 15, 60, 60)
    assert cfg.dataloader.train.mapper.loss_frames == "all"
    # Of a model for other classes everything is taken but the classifiers: what has as many outputs as there are.
    with torch.device("meta"):
        state = instantiate(cfg.model).state_dict()
    differ = {key.rpartition(".")[0] + ".*" for key, value in state.items() if value.shape[:1] == (11,)}
    assert set(cfg.train.init_may_differ) == differ
