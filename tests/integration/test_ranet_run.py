"""RANet's runs from files on disk to mIoU: training, both outputs, the six scales; from the command line too."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng

from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset, register_all
from ccnet_d2.engine import apply_overrides, train
from ccnet_d2.engine.command_line import main
from ccnet_d2.engine.training import evaluate_only
from ccnet_d2.model_zoo import get_config

HEIGHT, WIDTH = 40, 56
SMALL = [
    "train.device=cpu",
    "train.max_iter=2",
    "train.num_pictures=1",
    "train.init_checkpoint=''",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.crop_size=[33,41]",
    "model.backbone.depth=18",
    "model.backbone.norm=BN",
    "model.sem_seg_head.channels=16",
]


def write(image: Path, label: Path, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(np.r_[np.arange(classes), rng.integers(0, classes, 10 * 28 - classes)])
    for path, array in (
        (image, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)),
        (label, np.kron(blocks.reshape(10, 28).astype(np.uint8), np.ones((4, 2), np.uint8))),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), array)


def pascal_context(root: Path) -> None:
    voc = root / "VOC2010"
    for i, (split, names) in enumerate(
        {"train": ["2008_000002", "2008_000004"], "val": ["2008_000003"]}.items()
    ):
        for j, name in enumerate(names):
            label = voc / f"SegmentationClassContext59/{name}.png"
            write(voc / f"JPEGImages/{name}.jpg", label, 59, 2 * i + j)
        listed = voc / f"ImageSets/SegmentationContext/{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n")


def coco_stuff(root: Path) -> None:
    folder = root / "cocostuff-10k-v1.1"
    for i, split in enumerate(("train", "test")):
        names = [f"COCO_train2014_{2 * i + j:012d}" for j in range(2)]
        for j, name in enumerate(names):
            write(folder / f"images/{name}.jpg", folder / f"labels/{name}.png", 171, 2 * i + j)
        listed = folder / f"imageLists/{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "config", "options"),
    [
        (pascal_context, "pascal_context/ranet_R_101_D8_520x520_60k.py", []),
        (coco_stuff, "coco_stuff/ranet_R_101_D8_520x520_60k.py", ["model.sem_seg_head.variant=code"]),
    ],
)
def test_from_files_to_miou_of_both_outputs(tmp_path, layout, config, options):
    datasets, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    layout(tmp_path)
    register_all(tmp_path)
    try:
        output = tmp_path / "output"
        cfg = apply_overrides(get_config(config), [*SMALL, *options, f"train.output_dir={output}"])
        seed_all_rng(0)
        trained = train(cfg)
        records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
        losses = {key: value for record in records for key, value in record.items() if "loss" in key}
        expected = {"total_loss", "loss_sem_seg", "loss_sem_seg_coarse", "loss_boundary"}
        assert set(losses) == expected | ({"loss_boundary_fine"} if options else set())
        assert all(math.isfinite(value) and value > 0 for value in losses.values())

        again = [*SMALL, *options, f"train.output_dir={output}"]
        again.append(f"train.init_checkpoint={output / 'model_final.pth'}")
        scores = {}
        for name, extra in (("fine", []), ("coarse", ["model.sem_seg_head.output=coarse"])):
            cfg = apply_overrides(get_config(config), [*again, *extra])
            scores[name] = evaluate_only(cfg)["sem_seg"]
        assert trained is not None
        assert scores["fine"]["mIoU"] == pytest.approx(trained["sem_seg"]["mIoU"])
        # After two steps either may guess one class; that the outputs differ is tested below.
        assert all(0 <= score["mIoU"] <= 100 for score in scores.values())
    finally:
        for catalog, before in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
            catalog.data.clear()
            catalog.data.update(before)


def test_eval_only_scores_the_output_asked_for(tmp_path, monkeypatch):
    """Weights whose fine output is class 0 everywhere and whose coarse output is class 1: no figure can be mistaken."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_synthetic_dataset(tmp_path / "ccnet_synthetic", SyntheticConfig(train_images=1, val_images=2))
    register_all(tmp_path)
    try:
        weights = instantiate(get_config("toy/ranet_synthetic.py").model).state_dict()
        weights["sem_seg_head.classifier.bias"][0] = weights["sem_seg_head.semantic.bias"][1] = 1e4
        torch.save({"model": weights}, tmp_path / "model.pth")
        names = MetadataCatalog.get("ccnet_synthetic_val").stuff_classes
        for output, said in (("fine", 0), ("coarse", 1)):
            arguments = ["--config-file", "toy/ranet_synthetic.py", "--eval-only", "train.device=cpu"]
            arguments += [f"train.init_checkpoint={tmp_path / 'model.pth'}", "train.num_pictures=0"]
            arguments += [f"train.output_dir={tmp_path / output}", f"model.sem_seg_head.output={output}"]
            assert main(arguments) == 0
            scores = json.loads((tmp_path / output / "evaluation.json").read_text())["sem_seg"]
            found = {name: scores[f"ACC-{name}"] for name in names}
            present = [name for name in names if found[name] is not None]
            assert len(present) > 2
            assert {name: found[name] for name in present} == {
                name: 100.0 * (name == names[said]) for name in present
            }
    finally:
        monkeypatch.undo()
        register_all()
