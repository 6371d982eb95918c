"""A run of every data set from its files, in the layout in which they are published, to its mIoU in every test mode."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_ade20k, register_all_cityscapes
from detectron2.utils.env import seed_all_rng

from ccnet_d2.data import register_all
from ccnet_d2.engine import apply_overrides, build_model, evaluate, train
from ccnet_d2.inference import MODE_NAMES, MultiScaleFlip, SlidingWindow
from ccnet_d2.model_zoo import get_config

HEIGHT, WIDTH = 40, 64
SMALL = [
    "train.device=cpu",
    "train.max_iter=1",
    "train.num_pictures=1",
    "train.init_checkpoint=''",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.crop_size=[33,41]",
    "model.backbone.depth=18",
    "model.backbone.norm=BN",
    "model.sem_seg_head.norm=BN",
    "model.sem_seg_head.channels=16",
    "model.sem_seg_head.aux_channels=8",
]
SMALL_TEST = [f"dataloader.test.mapper.augmentations.0.{key}=48" for key in ("long_side", "short_side")]


def write(image_path: Path, label_path: Path, values: list[int], seed: int) -> None:
    """An image of noise and a label map of blocks, each of the values at least once."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice(values, (HEIGHT // 2, WIDTH // 2)).astype(np.uint8)
    blocks.ravel()[: len(values)] = values
    for path, array in (
        (image_path, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)),
        (label_path, np.kron(blocks, np.ones((2, 2), np.uint8))),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), array)


def cityscapes(root: Path) -> None:
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for i in range(2):
            stem = f"{city}_{i:06d}_000019"
            fine = root / "cityscapes/gtFine" / split / city
            image = root / "cityscapes/leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
            # Detectron2 wants the other files too, though it does not read them.
            for kind in ("labelTrainIds", "labelIds", "instanceIds"):
                write(image, fine / f"{stem}_gtFine_{kind}.png", [*range(19), 255], i)
            polygons = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": []}
            (fine / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
    forget("cityscapes_fine_sem_seg_", "cityscapes_fine_instance_seg_")
    register_all_cityscapes(str(root))


def ade20k(root: Path) -> None:
    ade = root / "ADEChallengeData2016"
    for folder, prefix in (("training", "ADE_train"), ("validation", "ADE_val")):
        for i in range(2):
            name = f"{prefix}_{i + 1:08d}"
            label = ade / "annotations_detectron2" / folder / f"{name}.png"
            write(ade / "images" / folder / f"{name}.jpg", label, [*range(150), 255], i)
    forget("ade20k_sem_seg_")
    register_all_ade20k(str(root))


def voc12(root: Path) -> None:
    voc = root / "VOC2012"
    for listed, kind, names in (
        ("train_aug", "SegmentationClassAug", ["2007_000032", "2008_000002"]),
        ("val", "SegmentationClass", ["2007_000033", "2007_000042"]),
    ):
        for i, name in enumerate(names):
            write(voc / f"JPEGImages/{name}.jpg", voc / kind / f"{name}.png", [*range(21), 255], i)
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{listed}.txt").write_text("\n".join(names) + "\n")
    register_all(root)


def camvid(root: Path) -> None:
    for split in ("train", "val"):
        for i, name in enumerate(("0001TP_006690", "0016E5_07959")):
            label = root / f"camvid/{split}annot/{name}.png"
            write(root / f"camvid/{split}/{name}.png", label, list(range(12)), i)
    register_all(root)


def forget(*prefixes: str) -> None:
    for name in [name for name in DatasetCatalog if name.startswith(prefixes)]:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


pytestmark = pytest.mark.usefixtures("catalogs_as_before")


def mean_iou(model: torch.nn.Module, cfg) -> float:
    """Percent, over the classes that occur; counted pixel by pixel from the model's own answers and the files."""
    mapper = instantiate(cfg.dataloader.test.mapper)
    name = cfg.dataloader.test.dataset.names
    void = MetadataCatalog.get(name).ignore_label
    pairs: list[np.ndarray] = []
    model.eval()
    for record in DatasetCatalog.get(name):
        with torch.no_grad():
            answer = model([mapper(dict(record))])[0]["sem_seg"].argmax(0).numpy()
        truth = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        assert answer.shape == truth.shape == (HEIGHT, WIDTH)
        pairs.append(np.stack([answer[truth != void], truth[truth != void]]))
    answers, truths = np.concatenate(pairs, axis=1)
    ious = [
        ((answers == c) & (truths == c)).sum() / ((answers == c) | (truths == c)).sum()
        for c in np.unique(truths)
    ]
    return 100 * float(np.mean(ious))


@pytest.mark.parametrize(
    ("layout", "config", "options"),
    [
        pytest.param(cityscapes, "cityscapes/ccnet_ccl_R_50_D8_769x769_60k.py", [], id="cityscapes"),
        pytest.param(cityscapes, "cityscapes/ccnet_ohem_R_101_D8_769x769_60k.py", [], id="cityscapes-ohem"),
        pytest.param(
            cityscapes, "cityscapes/ccnet_R_50_D8_769x769_40k.py", SMALL_TEST, id="cityscapes-mmseg"
        ),
        pytest.param(ade20k, "ade20k/ccnet_R_50_D8_512x512_80k.py", SMALL_TEST, id="ade20k"),
        pytest.param(ade20k, "ade20k/ccnet_ccl_R_101_D8_512x512_100k.py", SMALL_TEST, id="ade20k-paper"),
        pytest.param(voc12, "voc12/ccnet_R_50_D8_512x512_20k.py", SMALL_TEST, id="voc12-aug"),
        pytest.param(camvid, "camvid/ccnet_R_101_D8_504x504.py", SMALL_TEST, id="camvid"),
    ],
)
def test_from_files_to_miou(
    tmp_path: Path, layout: Callable[[Path], None], config: str, options: list[str]
) -> None:
    layout(tmp_path / "datasets")
    cfg = get_config(config)
    with_ccl = "category_consistent" in cfg.model.sem_seg_head
    cfg = apply_overrides(cfg, [*SMALL, *options, f"train.output_dir={tmp_path / 'output'}"])

    (tmp_path / "output").mkdir()
    seed_all_rng(0)
    trained = train(cfg)
    records = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    losses = {key: value for record in records for key, value in record.items() if "loss" in key}
    expected = {"total_loss", "loss_sem_seg", "loss_sem_seg_aux"}
    assert set(losses) == expected | ({"loss_category_consistent"} if with_ccl else set())
    assert all(math.isfinite(value) and value > 0 for value in losses.values())
    assert list((tmp_path / "output/pictures").glob("*.png"))

    model = build_model(cfg)
    weights = torch.load(tmp_path / "output/model_final.pth", weights_only=True)["model"]
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    # Pushed away from the start, where every pixel gets the same class.
    torch.manual_seed(0)
    torch.nn.init.normal_(model.sem_seg_head.classifier.weight)
    whole = mean_iou(model, cfg)

    def score(mode) -> float:
        cfg.test.inference = mode
        return evaluate(cfg, model)["sem_seg"]["mIoU"]

    by_mode = {"run": score(cfg.test.inference)} | {name: score(name) for name in MODE_NAMES}
    assert by_mode["run"] == pytest.approx(whole)  # a tile of 769 is the whole of these images
    assert by_mode["whole"] == pytest.approx(whole) and by_mode["slide"] == pytest.approx(whole)
    assert by_mode["ms"] == pytest.approx(by_mode["ms-slide"])
    assert 0 < by_mode["ms"] != pytest.approx(whole)
    tiles = L(SlidingWindow)(tile=[33, 25], stride=[20, 16])
    assert 0 < score(tiles) != pytest.approx(whole)
    assert 0 < score(L(MultiScaleFlip)(model=tiles, scales=[0.5, 1.0]))
    assert trained is not None and 0 <= trained["sem_seg"]["mIoU"] < 100
