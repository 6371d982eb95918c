"""The runs on LIP have the numbers of CE2P's recipes, which stand here a second time, and so has the model zoo."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T

from ccnet_d2.engine import apply_overrides
from ccnet_d2.inference import MultiScaleFlip
from ccnet_d2.model_zoo import config_names, get_config

PAPER = "lip/ce2p_ccl_R_101_D16_473x473_115k.py"
PLAIN = "lip/ce2p_R_101_D16_473x473_115k.py"
NEWER = "lip/ce2p_ccl_R_101_D16_384x384_48k.py"
TRAIN_IMAGES = 30462
PAGE = (Path(__file__).parents[2] / "projects/CCNet/MODEL_ZOO.md").read_text(encoding="utf-8")


def test_all_runs_are_here():
    assert {name for name in config_names() if name.startswith("lip/")} == {PAPER, PLAIN, NEWER}


@pytest.mark.parametrize(
    ("name", "crop", "lr", "batch", "loss"),
    [
        (PAPER, 473, 7e-3, 40, "piecewise"),
        (PLAIN, 473, 7e-3, 40, None),
        (NEWER, 384, 1e-3, 96, "piecewise"),
    ],
)
def test_recipe(name, crop, lr, batch, loss):
    cfg = get_config(name)
    optimizer = cfg.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (lr, 0.9, 5e-4)
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.train.max_iter * batch / TRAIN_IMAGES == pytest.approx(150, abs=1.1)
    multiplier = instantiate(cfg.lr_multiplier)
    assert [multiplier(x) for x in (0.0, 0.3, 1.0)] == pytest.approx([1.0, 0.7**0.9, 0.0])
    assert cfg.train.init_checkpoint == "detectron2://DeepLab/R-103.pkl"
    head = cfg.model.sem_seg_head
    assert (head.context, head.category_consistent, head.align_corners) == ("rcca", loss, True)
    assert (cfg.model.backbone.depth, cfg.model.backbone.output_stride) == (101, 16)
    mode = instantiate(cfg.test.inference)
    assert isinstance(mode, MultiScaleFlip) and mode.scales == (1.0,) and mode.flip

    mapper = instantiate(cfg.dataloader.train.mapper)
    assert mapper.flip_pairs == ((14, 15), (16, 17), (18, 19))
    first, flip = mapper.augmentations.augs
    assert first.crop_size == (crop, crop) and flip.prob == 0.5
    if name == NEWER:
        assert (first.scale_std, first.angle_std, first.angle_probability) == (0.25, 30, 0.6)
    else:
        assert first.scale_choices == pytest.approx([0.5 + i / 10 for i in range(12)])
    given = T.AugInput(np.zeros((220, 130, 3), np.uint8), sem_seg=np.zeros((220, 130), np.uint8))
    mapper.augmentations(given)
    assert given.image.shape == (crop, crop, 3)
    tested = T.AugInput(np.zeros((220, 130, 3), np.uint8))
    instantiate(cfg.dataloader.test.mapper).augmentations(tested)
    assert tested.image.shape[:2] == ((384, 227) if name == NEWER else (473, 473))


def test_the_baseline_is_one_override():
    cfg = apply_overrides(get_config(PLAIN), ["model.sem_seg_head.context=psp"])
    with torch.device("meta"):
        assert type(instantiate(cfg.model).sem_seg_head.context.context).__name__ == "PSP"


def test_model_zoo_rows():
    rows = dict(
        re.findall(r"^\| \[(lip/[^]]+)\]\(\.\./\.\./configs/lip/[^)]+\) \|(.*)\|$", PAGE, re.MULTILINE)
    )
    assert {f"{name}.py" for name in rows} == {PAPER, PLAIN, NEWER}
    for name, row in rows.items():
        backbone, crop, iterations, batch, *figures, weights = [cell.strip() for cell in row.split("|")]
        cfg = get_config(f"{name}.py")
        assert ("CCL" in backbone) == (cfg.model.sem_seg_head.category_consistent is not None)
        height, width = cfg.dataloader.train.mapper.augmentations[0].crop_size
        assert crop == f"{height}x{width}" and int(batch) == cfg.dataloader.train.total_batch_size
        assert iterations == f"{round(cfg.train.max_iter / 1000)}k" and name.endswith(f"{crop}_{iterations}")
        # Nothing was trained here.
        assert figures[:5] == [""] * 5 and weights == ""
        assert figures[5:] == (["88.01", "63.91", "55.47"] if f"{name}.py" == PAPER else ["–"] * 3)
    assert "87.37, 63.20 and 53.10 are reported" in PAGE


def test_small_run_builds():
    cfg = get_config("quick_schedules/ce2p_ccl_R_18_lip_fixture.py")
    assert set(cfg) == {"dataloader", "lr_multiplier", "model", "optimizer", "test", "train"}
    model = instantiate(cfg.model)
    assert sum(p.numel() for p in model.parameters()) < 14e6
    assert instantiate(cfg.dataloader.train.mapper).flip_pairs
