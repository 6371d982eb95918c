"""Every run: it loads, builds, and has the numbers of its recipe, which stand here a second time."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.solver import LRMultiplier
from omegaconf import DictConfig

import ccnet_d2.data  # noqa: F401  registers the data sets
from ccnet_d2.engine import apply_overrides
from ccnet_d2.inference import InferenceMode, SlidingWindow, build_mode
from ccnet_d2.model_zoo import config_names, get_config

SLIDE = (769, 513)

# Detection runs have tests of their own: tests/modeling/test_rcca_resnet.py, tests/integration/test_detection.py.
DETECTION = ("coco/", "quick_schedules/")
SEGMENTATION_RUNS = [name for name in config_names() if not name.startswith(DETECTION)]


@dataclass(frozen=True)
class Recipe:
    """What a run has to be, by source; `parameters` are millions, counted by hand or published."""

    depth: int
    classes: int
    crop: tuple[int, int]
    iterations: int
    batch: int = 8
    weight_decay: float = 1e-4
    end_lr: float = 0.0
    stem: tuple[int, ...] | None = (64, 64, 128)
    ceil_mode: bool = True
    first_dilations: tuple[int, int] = (2, 4)  # of the first block of res4 and of res5
    activation: str = "leaky_relu"
    aux_channels: int = 512
    align_corners: bool = True
    recurrence: int = 2
    loss: str = "CrossEntropy"
    category_consistent: str | None = None
    scale_range: tuple[float, float] | None = (0.75, 2.0)
    scale_choices: tuple[float, ...] | None = None
    short_sides: tuple[int, ...] | None = None
    base_size: tuple[int, int] | None = None
    category_max_ratio: float | None = None
    photometric: bool = False
    slide: tuple[int, int] | None = None
    test_size: tuple[int, int] = (1024, 2048)  # what becomes of a test image of 1024x2048
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    channel_order: str = "RGB"
    init: str = ""


PAPER = Recipe(101, 19, (769, 769), 60000, slide=SLIDE, init="detectron2://DeepLab/R-103.pkl")
PAPER_50 = replace(PAPER, depth=50, init="detectron2://DeepLab/R-52.pkl")
OFFICIAL = replace(
    PAPER,
    scale_range=None,
    scale_choices=(0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1),
    mean=(104.00698793, 116.66876762, 122.67891434),
    std=(1.0, 1.0, 1.0),
    channel_order="BGR",
    init="ccnet://imagenet/resnet101_mit",
)
MMSEG = Recipe(
    50,
    19,
    (512, 1024),
    40000,
    weight_decay=5e-4,
    end_lr=1e-4,
    stem=(32, 32, 64),
    ceil_mode=False,
    first_dilations=(1, 2),
    activation="relu",
    aux_channels=256,
    align_corners=False,
    scale_range=(0.5, 2.0),
    base_size=(2048, 1024),
    category_max_ratio=0.75,
    photometric=True,
    init="ccnet://imagenet/resnet50_v1c",
)
MMSEG_769 = replace(
    MMSEG,
    crop=(769, 769),
    align_corners=True,
    base_size=(2049, 1025),
    slide=SLIDE,
    test_size=(1025, 2049),
)
MMSEG_512 = replace(MMSEG, crop=(512, 512), base_size=(2048, 512), batch=16, test_size=(512, 1024))
ADE = replace(MMSEG_512, classes=150, iterations=80000)
VOC = replace(MMSEG_512, classes=21, iterations=20000)
ADE_PAPER = replace(
    PAPER,
    classes=150,
    crop=(512, 512),
    iterations=100000,
    batch=16,
    scale_range=None,
    short_sides=(300, 375, 450, 525, 600),
    slide=None,
    test_size=(512, 1024),
)


def deep(recipe: Recipe, **changes) -> Recipe:
    """The same with ResNet-101."""
    return replace(recipe, depth=101, init=recipe.init.replace("50", "101"), **changes)


RECIPES = {
    "cityscapes/ccnet_R_101_D8_769x769_60k.py": PAPER,
    "cityscapes/ccnet_r1_R_101_D8_769x769_60k.py": replace(PAPER, recurrence=1),
    "cityscapes/ccnet_r3_R_101_D8_769x769_60k.py": replace(PAPER, recurrence=3),
    "cityscapes/ccnet_ccl_R_101_D8_769x769_60k.py": replace(PAPER, category_consistent="piecewise"),
    "cityscapes/ccnet_R_50_D8_769x769_60k.py": PAPER_50,
    "cityscapes/ccnet_r1_R_50_D8_769x769_60k.py": replace(PAPER_50, recurrence=1),
    "cityscapes/ccnet_r3_R_50_D8_769x769_60k.py": replace(PAPER_50, recurrence=3),
    "cityscapes/ccnet_ccl_R_50_D8_769x769_60k.py": replace(PAPER_50, category_consistent="piecewise"),
    "cityscapes/ccnet_official_R_101_D8_769x769_60k.py": OFFICIAL,
    "cityscapes/ccnet_official_r1_R_101_D8_769x769_60k.py": replace(OFFICIAL, recurrence=1),
    "cityscapes/ccnet_ohem_R_101_D8_769x769_60k.py": replace(OFFICIAL, loss="OHEMCrossEntropy"),
    "cityscapes/ccnet_R_50_D8_512x1024_40k.py": MMSEG,
    "cityscapes/ccnet_R_101_D8_512x1024_40k.py": deep(MMSEG),
    "cityscapes/ccnet_R_50_D8_512x1024_80k.py": replace(MMSEG, iterations=80000),
    "cityscapes/ccnet_R_101_D8_512x1024_80k.py": deep(MMSEG, iterations=80000),
    "cityscapes/ccnet_R_50_D8_769x769_40k.py": MMSEG_769,
    "cityscapes/ccnet_R_101_D8_769x769_40k.py": deep(MMSEG_769),
    "cityscapes/ccnet_R_50_D8_769x769_80k.py": replace(MMSEG_769, iterations=80000),
    "cityscapes/ccnet_R_101_D8_769x769_80k.py": deep(MMSEG_769, iterations=80000),
    "ade20k/ccnet_R_50_D8_512x512_80k.py": ADE,
    "ade20k/ccnet_R_101_D8_512x512_80k.py": deep(ADE),
    "ade20k/ccnet_R_50_D8_512x512_160k.py": replace(ADE, iterations=160000),
    "ade20k/ccnet_R_101_D8_512x512_160k.py": deep(ADE, iterations=160000),
    "ade20k/ccnet_R_101_D8_512x512_100k.py": ADE_PAPER,
    "ade20k/ccnet_ccl_R_101_D8_512x512_100k.py": replace(ADE_PAPER, category_consistent="piecewise"),
    "voc12/ccnet_R_50_D8_512x512_20k.py": VOC,
    "voc12/ccnet_R_101_D8_512x512_20k.py": deep(VOC),
    "voc12/ccnet_R_50_D8_512x512_40k.py": replace(VOC, iterations=40000),
    "voc12/ccnet_R_101_D8_512x512_40k.py": deep(VOC, iterations=40000),
}

# The keys that others rely on, and nothing else: any dict left over in a run's file would be one more.
KEYS = {"dataloader", "lr_multiplier", "model", "optimizer", "test", "train"}


@cache
def _loaded(name: str) -> DictConfig:
    return get_config(name)


def load(name: str) -> DictConfig:
    return _loaded(name).copy()


@pytest.mark.parametrize("name", SEGMENTATION_RUNS)
def test_every_run_builds(name):
    cfg = load(name)
    assert set(cfg) == KEYS
    with torch.device("meta"):
        model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    groups = optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["weight_decay"] for group in groups} == {cfg.optimizer.weight_decay}

    LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    assert groups[0]["lr"] == cfg.optimizer.lr

    classes = len(MetadataCatalog.get(cfg.dataloader.test.dataset.names).stuff_classes)
    assert classes == cfg.model.sem_seg_head.num_classes
    train, test = instantiate(cfg.dataloader.train.mapper), instantiate(cfg.dataloader.test.mapper)
    assert train.is_train and train.label_map.num_classes == classes and not test.is_train
    assert train.image_format == test.image_format == cfg.model.input_format
    assert cfg.dataloader.evaluator.dataset_name == cfg.dataloader.test.dataset.names
    mode = cfg.test.inference
    assert isinstance(build_mode(mode) if isinstance(mode, str) else instantiate(mode), InferenceMode)
    assert isinstance(cfg.train.init_checkpoint, str)


def test_every_run_of_the_papers_and_zoos_is_here():
    assert {
        name
        for name in SEGMENTATION_RUNS
        if name.split("/")[0] in ("cityscapes", "ade20k", "voc12") and "/ranet_" not in name
    } == {*RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_model_and_training_are_the_recipe_s(name):
    cfg, recipe = load(name), RECIPES[name]
    with torch.device("meta"):
        model = instantiate(cfg.model)
    net, head = model.backbone, model.sem_seg_head
    assert [len(stage) for stage in net.stages] == {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[recipe.depth]
    assert tuple(getattr(net.stem, f"conv{i}").out_channels for i in (1, 2, 3)) == recipe.stem
    assert net.stem.ceil_mode == recipe.ceil_mode
    for stage, strides, dilation, first in (
        (net.res2, 1, 1, 1),
        (net.res3, 2, 1, 1),
        (net.res4, 1, 2, recipe.first_dilations[0]),
        (net.res5, 1, 4, recipe.first_dilations[1]),
    ):
        assert stage[0].conv2.stride == (strides, strides) and stage[0].conv1.stride == (1, 1)
        assert [block.conv2.dilation[0] for block in stage] == [first] + [dilation] * (len(stage) - 1)
    assert isinstance(net.stem.conv1.norm, torch.nn.SyncBatchNorm)
    assert isinstance(head.conva.norm, torch.nn.SyncBatchNorm)

    assert head.conva.weight.shape == (512, 2048, 3, 3) and head.fuse.weight.shape == (512, 2560, 3, 3)
    slope = {"relu": torch.nn.ReLU, "leaky_relu": torch.nn.LeakyReLU}[recipe.activation]
    assert type(head.conva.activation) is slope
    assert head.context.recurrence == recipe.recurrence and head.context.key_channels == 64
    assert head.classifier.weight.shape == (recipe.classes, 512, 1, 1)
    assert head.auxiliary[0].weight.shape == (recipe.aux_channels, 1024, 3, 3)
    assert (head.aux_loss_weight, head.dropout.p, head.align_corners) == (0.4, 0.1, recipe.align_corners)
    assert type(head.loss).__name__ == recipe.loss and head.loss.align_corners == recipe.align_corners
    form = None if head.category_features is None else head.category_consistent_loss.form
    assert form == recipe.category_consistent

    assert model.input_format == recipe.channel_order
    assert tuple(cfg.model.pixel_mean) == recipe.mean and tuple(cfg.model.pixel_std) == recipe.std

    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.01, 0.9)
    assert cfg.optimizer.weight_decay == recipe.weight_decay
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (recipe.iterations, recipe.batch)
    assert cfg.train.init_checkpoint == recipe.init
    multiplier = instantiate(cfg.lr_multiplier)
    for where in (0.0, 0.25, 0.9, 1.0):
        expected = (0.01 - recipe.end_lr) * (1 - where) ** 0.9 + recipe.end_lr
        assert 0.01 * multiplier(where) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_data_and_test_mode_are_the_recipe_s(name):
    cfg, recipe = load(name), RECIPES[name]
    mapper = instantiate(cfg.dataloader.train.mapper)
    crop, flip, *rest = mapper.augmentations.augs
    for given, expected in (
        (crop.crop_size, recipe.crop),
        (crop.scale_range, recipe.scale_range),
        (crop.scale_choices, recipe.scale_choices),
        (crop.short_side_choices, recipe.short_sides),
        (crop.base_size, recipe.base_size),
        (crop.category_max_ratio, recipe.category_max_ratio),
        (crop.pad_value, recipe.mean),
        (crop.label_pad_value, 255),
        (flip.prob, 0.5),
        ([type(one).__name__ for one in rest], ["RandomPhotometricDistortion"] * recipe.photometric),
    ):
        assert given == (pytest.approx(expected) if isinstance(expected, tuple) else expected)
    # What a street scene becomes.
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (256, 512, 3), dtype=np.uint8)
    augmented = T.AugInput(image, sem_seg=rng.integers(0, 19, (256, 512), dtype=np.uint8))
    mapper.augmentations(augmented)
    assert augmented.image.shape == (*recipe.crop, 3) and augmented.sem_seg.shape == recipe.crop

    tested = T.AugInput(np.zeros((1024, 2048, 3), np.uint8))
    instantiate(cfg.dataloader.test.mapper).augmentations(tested)
    assert tested.image.shape[:2] == recipe.test_size
    if recipe.slide is None:
        assert cfg.test.inference == "whole"
    else:
        mode = instantiate(cfg.test.inference)
        assert type(mode) is SlidingWindow
        assert (mode.tile, mode.stride) == ((recipe.slide[0],) * 2, (recipe.slide[1],) * 2)


def test_published_number_of_parameters():
    """mmsegmentation's CCNet R-50-D8 on Cityscapes, counted by hand from its published layout."""

    def conv_norm(c_in: int, c_out: int, kernel: int) -> int:
        return c_in * c_out * kernel**2 + 2 * c_out

    total = conv_norm(3, 32, 3) + conv_norm(32, 32, 3) + conv_norm(32, 64, 3)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        total += conv_norm(channels, 4 * width, 1)
        for block in range(blocks):
            total += conv_norm(channels if block == 0 else 4 * width, width, 1)
            total += conv_norm(width, width, 3) + conv_norm(width, 4 * width, 1)
        channels = 4 * width
    total += conv_norm(2048, 512, 3) + conv_norm(512, 512, 3) + conv_norm(2560, 512, 3)
    total += 2 * (512 * 64 + 64) + 512 * 512 + 512 + 1  # query, key, value, gamma
    total += 512 * 19 + 19
    total += conv_norm(1024, 256, 3) + 256 * 19 + 19
    with torch.device("meta"):
        model = instantiate(load("cityscapes/ccnet_R_50_D8_512x1024_40k.py").model)
    assert sum(p.numel() for p in model.parameters()) == total


def test_overrides_move_what_depends_on_them():
    cfg = apply_overrides(
        load("ade20k/ccnet_R_50_D8_512x512_80k.py"),
        ["train.max_iter=20", "optimizer.lr=0.02", "model.backbone.depth=101", "model.backbone.norm=BN"],
    )
    assert instantiate(cfg.lr_multiplier)(1.0) == pytest.approx(1e-4 / 0.02)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optimizer.lr)
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    expected = (0.02 - 1e-4) * 0.5**0.9 + 1e-4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert cfg.train.init_checkpoint == "ccnet://imagenet/resnet101_v1c"
    assert cfg.model.sem_seg_head.norm == "BN" and cfg.model.sem_seg_head.input_shape.depth == 101
    cfg = apply_overrides(cfg, ["dataloader.train.dataset.names=voc12_sem_seg_train_aug"])
    assert instantiate(cfg.dataloader.train.mapper).label_map.num_classes == 21


@pytest.mark.parametrize(
    "name", [n for n in config_names() if "norm" in (load(n).model.get("sem_seg_head") or ())]
)
def test_the_head_has_the_backbone_s_norm(name):
    """One override is for both: a head left at BN would train on each GPU's own statistics without a word."""
    cfg = apply_overrides(load(name), ["model.backbone.norm=GN"])
    assert cfg.model.sem_seg_head.norm == "GN"
