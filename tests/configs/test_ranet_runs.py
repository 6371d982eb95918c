"""RANet's runs: the numbers of its paper, which stand here a second time, its tables' rows, and the model zoo page."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from ccnet_d2.engine import apply_overrides
from ccnet_d2.model_zoo import config_names, get_config

PAGE = (Path(__file__).parents[2] / "projects/CCNet/MODEL_ZOO.md").read_text(encoding="utf-8")
CITYSCAPES = "cityscapes/ranet_R_101_D8_769x769_40k.py"
# Classes, crop, iterations, training set, reported mIoU fine and coarse (Sec. 4, Tab. 4 and 6).
PAPER = {
    CITYSCAPES: (19, 769, 40000, "cityscapes_fine_sem_seg_train", "81.9", "77.3"),
    "pascal_context/ranet_R_101_D8_520x520_60k.py": (
        *(59, 520, 60000, "pascal_context_59_sem_seg_train"),
        *("54.9", "51.2"),
    ),
    "coco_stuff/ranet_R_101_D8_520x520_60k.py": (
        *(171, 520, 60000, "coco_stuff_10k_sem_seg_train"),
        *("40.7", "37.9"),
    ),
}
SMALL = "camvid/ranet_R_18_D8_half.py"


def test_these_are_all_runs_of_ranet():
    names = {name for name in config_names() if "/ranet_" in name}
    assert names == {*PAPER, SMALL, "toy/ranet_synthetic.py"}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_recipe(name):
    classes, crop, iterations, train, *_ = PAPER[name]
    cfg = get_config(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    net, head = model.backbone, model.sem_seg_head
    assert [len(stage) for stage in net.stages] == [3, 4, 23, 3]
    assert net.res5[1].conv2.dilation == (4, 4) and net.res4[1].conv2.dilation == (2, 2)  # stride 8
    assert head.reduce.conv.weight.shape == (512, 2048, 3, 3)
    assert head.semantic.weight.shape == (classes, 512, 1, 1) and head.boundary.weight.shape[0] == 1
    assert head.classifier.weight.shape == (classes, 512, 1, 1)
    construction = head.context.construction
    assert (construction.variant, construction.representatives) == ("paper", 8)
    assert (head.coarse_loss_weight, head.boundary_loss_weight, head.boundary_loss.radius) == (0.4, 0.2, 2)

    assert head.align_corners and head.boundary_loss.align_corners and head.loss.align_corners

    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (1e-3, 0.9, 1e-4)
    multiplier = instantiate(cfg.lr_multiplier)
    assert [multiplier(where) for where in (0.0, 0.25, 0.5)] == pytest.approx([1.0, 0.75, 0.5])
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (iterations, 8)
    assert cfg.dataloader.train.dataset.names == train
    scale, flip, brightness = instantiate(cfg.dataloader.train.mapper).augmentations.augs
    assert tuple(scale.crop_size) == (crop, crop) and scale.scale_range == (0.5, 2.0)
    assert flip.prob == 0.5 and brightness.intensity_min < 1 < brightness.intensity_max
    mode = instantiate(cfg.test.inference)
    assert mode.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and not mode.flip


def test_the_small_run_differs_from_ccnet_s_in_the_network_alone():
    ours, theirs = get_config(SMALL), get_config("camvid/ccnet_R_18_D8_half.py")
    for key in ("dataloader", "optimizer", "lr_multiplier", "train", "test"):
        assert ours[key] == theirs[key], key
    assert ours.model.backbone == theirs.model.backbone
    ours, theirs = get_config("toy/ranet_synthetic.py"), get_config("toy/ccnet_synthetic.py")
    for key in ("dataloader", "optimizer", "lr_multiplier", "train", "test"):
        assert ours[key] == theirs[key], key


def test_pascal_context_with_background():
    name = "pascal_context/ranet_R_101_D8_520x520_60k.py"
    source = Path(__file__).parents[2] / "configs" / name
    overrides = re.findall(r"(?:model|dataloader)\.[a-z_.]+=\w+", source.read_text())
    assert len(overrides) == 3
    cfg = apply_overrides(get_config(name), overrides)
    assert instantiate(cfg.dataloader.train.mapper).label_map.num_classes == 60
    assert cfg.model.sem_seg_head.num_classes == 60
    assert cfg.dataloader.evaluator.dataset_name == "pascal_context_60_sem_seg_val"


def test_rows_of_the_paper_s_tables_are_overrides():
    section = PAGE.partition("\n## RANet\n")[2].partition("\n## ")[0]
    overrides = re.findall(r"`(\.[a-z_]+=[^`]+)`", section)
    assert {".context=psp", ".inter=False", ".representatives=2", ".variant=code"} <= set(overrides)
    models = set()
    for override in overrides:
        cfg = apply_overrides(get_config(CITYSCAPES), [f"model.sem_seg_head{override}"])
        with torch.device("meta"):
            models.add(str(instantiate(cfg.model.sem_seg_head).context))
    assert (
        len(models) == len(set(overrides) - {".output=coarse"}) + 1
    )  # the coarse output is of the same model


def test_the_model_zoo_page():
    for name, (_, crop, iterations, _, fine, coarse) in PAPER.items():
        row = f"| R-101, K=8 | {crop}x{crop} | {iterations // 1000}k | 8 | | | | | {fine} | {coarse} | |"
        assert f"| [{name[:-3]}](../../configs/{name}) {row}" in PAGE
    assert f"| [{SMALL[:-3]}](../../configs/{SMALL}) | R-18, K=8 | 160x208 | 3k | 8 |" in PAGE
