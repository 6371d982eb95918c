"""Runs on clips, from files to mIoU: training, checkpoints of the 2D network, evaluation of every frame once."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog

from ccnet_d2.data import register_all
from ccnet_d2.engine import apply_overrides, build_model, evaluate, evaluate_only, train
from ccnet_d2.model_zoo import get_config

SIZE = (40, 56)
SMALL = [
    "train.device=cpu",
    "train.max_iter=2",
    "train.seed=0",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.base_size=[56,40]",
    "dataloader.train.mapper.augmentations.0.crop_size=[33,41]",
    "dataloader.test.mapper.augmentations.0.long_side=48",
    "dataloader.test.mapper.augmentations.0.short_side=40",
    "model.sem_seg_head.channels=16",
    "model.sem_seg_head.aux_channels=8",
]


pytestmark = pytest.mark.usefixtures("catalogs_as_before")


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Frames in the SegNet layout: a sequence of seven and one of two for training, seven to test on."""
    rng = np.random.default_rng(0)
    train = [f"0001TP_{n:06d}" for n in range(30, 240, 30)] + ["0006R0_f00930", "0006R0_f00960"]
    for split, names in (("train", train), ("val", [f"0016E5_{n:05d}" for n in range(7959, 7973, 2)])):
        for name in names:
            blocks = rng.integers(0, 12, (SIZE[0] // 4, SIZE[1] // 4), dtype=np.uint8)
            label = np.kron(blocks, np.ones((4, 4), np.uint8))
            for folder, array in (
                (split, rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)),
                (f"{split}annot", label),
            ):
                (tmp_path / "camvid" / folder).mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(tmp_path / "camvid" / folder / f"{name}.png"), array)
    register_all(tmp_path)
    return tmp_path


def mean_iou(cfg, model) -> float:
    """Percent, counted from the model's answers on clips of five frames three apart, cut by hand."""
    mapper = instantiate(cfg.dataloader.test.mapper)
    records = sorted(DatasetCatalog.get("camvid_sem_seg_val"), key=lambda record: record["file_name"])
    pairs = []
    for first in range(3):
        clip = mapper({"file_name": "", "frames": records[first::3]})
        with torch.no_grad():
            logits = model.eval()([clip])[0]["sem_seg"]
        for record, answer in zip(records[first::3], logits.argmax(1).numpy(), strict=True):
            truth = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
            pairs.append(np.stack([answer[truth != 11], truth[truth != 11]]))
    answers, truths = np.concatenate(pairs, axis=1)
    ious = [
        ((answers == c) & (truths == c)).sum() / ((answers == c) | (truths == c)).sum()
        for c in np.unique(truths)
    ]
    return 100 * float(np.mean(ious))


@pytest.mark.slow
def test_from_frames_to_miou(camvid, tmp_path):
    cfg = get_config("camvid/ccnet3d_T5_R_18_D8_half.py")
    output = tmp_path / "output"
    cfg = apply_overrides(cfg, [*SMALL, "dataloader.test.dataset.step=3", f"train.output_dir={output}"])
    clips = instantiate(cfg.dataloader.train.dataset)
    assert [len(clip["frames"]) for clip in clips] == [5] * 4  # three of the long sequence, one of the short
    results = train(cfg)
    losses = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [record["total_loss"] for record in losses if "total_loss" in record]
    assert losses and all(map(math.isfinite, losses))
    model = build_model(cfg)
    weights = torch.load(output / "model_final.pth", weights_only=True)["model"]
    model.load_state_dict(weights)
    assert results["sem_seg"]["mIoU"] == pytest.approx(mean_iou(cfg, model))

    cfg.train.init_checkpoint = str(output / "model_final.pth")
    assert evaluate_only(cfg)["sem_seg"] == pytest.approx(results["sem_seg"], nan_ok=True)

    # Another length of clip needs no other weights.
    torch.nn.init.normal_(model.sem_seg_head.classifier.weight)
    torch.nn.init.constant_(model.sem_seg_head.context.gamma, 1.0)
    five = evaluate(cfg, model)["sem_seg"]["mIoU"]
    assert five == pytest.approx(mean_iou(cfg, model))
    cfg.dataloader.train.dataset.length = 1
    assert evaluate(cfg, model)["sem_seg"]["mIoU"] != pytest.approx(five, abs=1e-9)


@pytest.mark.slow
def test_a_run_on_clips_starts_from_a_2d_model_of_other_classes(camvid, tmp_path):
    torch.manual_seed(0)
    flat = apply_overrides(
        get_config("camvid/ccnet_R_18_D8_half.py"), [*SMALL[-2:], "model.sem_seg_head.num_classes=19"]
    )
    source = instantiate(flat.model).state_dict()
    torch.save({"model": source}, tmp_path / "flat.pth")
    differ = get_config("camvid/ccnet3d_T5_R_101_D8_504x504.py").train.init_may_differ
    cfg = get_config("camvid/ccnet3d_T5_R_18_D8_half.py")
    options = [f"train.init_checkpoint={tmp_path / 'flat.pth'}", f"train.output_dir={tmp_path / 'output'}"]
    cfg = apply_overrides(cfg, [*SMALL, *options, "train.max_iter=1", "optimizer.lr=0.0"])
    with pytest.raises(ValueError, match="does not fit the model"):
        train(cfg)
    cfg.train.init_may_differ = differ
    train(cfg)
    trained = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    for key, value in source.items():
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        if key.startswith(("sem_seg_head.classifier", "sem_seg_head.auxiliary.2")):
            assert trained[key].shape[0] == 11
        else:
            assert torch.equal(trained[key], value), key
