"""Human parsing from the command line: training on the drawn fixture, evaluation, pictures, and wrong data sets."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.data import register_all
from ccnet_d2.data.datasets.lip import LIP_COLORS, LIP_FLIP_PAIRS
from ccnet_d2.data.datasets.lip_fixture import LipFixtureConfig, generate_lip_fixture, register_lip_fixture
from ccnet_d2.engine import apply_overrides
from ccnet_d2.engine.command_line import main
from ccnet_d2.inference import Predictor
from ccnet_d2.model_zoo import get_config
from tests.scripts import load_script

RUN = "lip/ce2p_ccl_R_101_D16_473x473_115k.py"
FIXTURE_RUN = "quick_schedules/ce2p_ccl_R_18_lip_fixture.py"
# The run of LIP at a size for tests.
SMALL = [
    "model.backbone.depth=18",
    "model.backbone.stem=basic",
    "model.backbone.norm=BN",
    *(
        f"model.sem_seg_head.{key}=16"
        for key in ("channels", "decoder_channels", "fine_channels", "edge_channels")
    ),
    "dataloader.train.mapper.augmentations.0.crop_size=[48,32]",
    "dataloader.test.mapper.augmentations.0.height=64",
    "dataloader.test.mapper.augmentations.0.width=64",
    "train.init_checkpoint=''",
]


@pytest.fixture
def lip(tmp_path, monkeypatch):
    """The fixture in LIP's place; its folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_lip_fixture(tmp_path / "LIP", LipFixtureConfig(train_images=13, val_images=12, size=64))
    register_all(tmp_path)
    yield tmp_path / "LIP"
    monkeypatch.undo()
    register_all()


@pytest.fixture
def train_net(tmp_path, capsys):
    """Runs train_net.py in this process; gives its status and what it said was wrong."""

    def run(*arguments, config=RUN, output="output", options=SMALL):
        common = [
            "train.device=cpu",
            "train.seed=0",
            "train.num_pictures=1",
            f"train.output_dir={tmp_path / output}",
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
        ]
        flags = [a for a in arguments if a.startswith("--")]
        rest = [a for a in arguments if not a.startswith("--")]
        status = main(["--config-file", config, *flags, *common, *options, *rest])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return status, errors

    return run


FEW = ["train.max_iter=2", "dataloader.train.total_batch_size=2"]


def evaluation(output: Path) -> dict[str, float]:
    return json.loads((output / "evaluation.json").read_text())["sem_seg"]


def test_train_evaluate_and_draw(lip, train_net, tmp_path, capsys):
    assert train_net(*FEW) == (0, [])
    trained = evaluation(tmp_path / "output")
    assert {"mIoU", "pACC", "mACC", "IoU-Left-arm"} <= set(trained)
    metrics = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert {key for line in metrics for key in line if key.startswith("loss_")} == {
        "loss_parsing_1", "loss_parsing_2", "loss_edge", "loss_category_consistent",
    }  # fmt: skip
    weights = tmp_path / "output/model_final.pth"
    checkpoint = f"train.init_checkpoint={weights}"
    assert train_net("--eval-only", checkpoint, output="again", options=SMALL[:-1]) == (0, [])
    assert evaluation(tmp_path / "again") == trained

    picture = tmp_path / "picture.png"
    arguments = [
        "--checkpoint",
        weights,
        "--input",
        next((lip / "val_images").iterdir()),
        "--output",
        picture,
    ]
    options = ["--labels", "--opts", "train.device=cpu", *SMALL[:-1]]
    assert load_script("demo.py").main(["--config-file", RUN, *map(str, arguments), *options]) == 0
    assert np.asarray(Image.open(picture)).max() < 20


def test_metrics_are_of_the_mirror_test_at_the_original_size(lip, train_net, tmp_path):
    assert train_net(*FEW)[0] == 0
    cfg = get_config(RUN)
    cfg = apply_overrides(cfg, [*SMALL, "train.device=cpu"])
    model = instantiate(cfg.model).eval()
    model.load_state_dict(torch.load(tmp_path / "output/model_final.pth", weights_only=True)["model"])
    right = total = 0
    order = list(range(20))
    for a, b in LIP_FLIP_PAIRS:
        order[a], order[b] = b, a
    for path in sorted((lip / "val_images").iterdir()):
        label = cv2.imread(str(lip / f"val_segmentations/{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        image = cv2.resize(cv2.imread(str(path))[:, :, ::-1], (64, 64), interpolation=cv2.INTER_LINEAR)
        probabilities = []
        for seen in (image, image[:, ::-1]):
            given = torch.from_numpy(seen.transpose(2, 0, 1).copy())
            with torch.no_grad():
                (answer,) = model([{"image": given, "height": label.shape[0], "width": label.shape[1]}])
            probabilities.append(answer["sem_seg"].softmax(0).numpy())
        mean = probabilities[0] + probabilities[1][order][:, :, ::-1]
        right += (mean.argmax(0) == label).sum()
        total += label.size
    assert evaluation(tmp_path / "output")["pACC"] == pytest.approx(100 * right / total, abs=0.02)


def test_predictor_swaps_in_every_mirror_mode(lip, train_net, tmp_path):
    assert train_net(*FEW)[0] == 0
    cfg = get_config(RUN)
    cfg = apply_overrides(cfg, [*SMALL, "train.device=cpu"])
    weights = tmp_path / "output/model_final.pth"
    assert Predictor(cfg, weights).mode.flip_pairs == LIP_FLIP_PAIRS
    predictor = Predictor(cfg, weights, mode="ms-slide")
    assert predictor.mode.flip_pairs == LIP_FLIP_PAIRS
    prediction = predictor(next((lip / "val_images").iterdir()))
    assert prediction.classes.names[14] == "Left-arm"
    assert prediction.classes.colors.tolist() == [list(color) for color in LIP_COLORS]


def wrong_layout(lip: Path) -> None:
    (lip / "train_images").rename(lip / "JPEGImages")


def no_labels(lip: Path) -> None:
    shutil.rmtree(lip / "train_segmentations")


def missing_label(lip: Path) -> None:
    sorted((lip / "train_segmentations").iterdir())[3].unlink()


def label_twenty(lip: Path) -> None:
    for path in (lip / "train_segmentations").iterdir():
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        label[5, 5] = 20
        cv2.imwrite(str(path), label)


def validation_label_twenty(lip: Path) -> None:
    path = sorted((lip / "val_segmentations").iterdir())[2]
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    label[5, 5] = 20
    cv2.imwrite(str(path), label)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (wrong_layout, ["'lip_sem_seg_train'", "neither 'train_images' nor", "it holds 'JPEGImages'"]),
        (no_labels, ["neither 'train_segmentations' nor 'TrainVal_parsing_annotations/train_segmentations'"]),
        (
            missing_label,
            ["train_segmentations' has no label map for '100003_400003'", "train_id.txt' names."],
        ),
        (
            label_twenty,
            ["train_segmentations/", "holds the value 20, but classes are 0 to 19 and void is 255."],
        ),
        (validation_label_twenty, ["val_segmentations/200002_400002.png' holds the value 20"]),
    ],
)
def test_wrong_data_is_one_sentence(lip, train_net, capsys, damage, words):
    damage(lip)
    status, errors = train_net("train.max_iter=1", "dataloader.train.total_batch_size=2")
    assert status == 1 and len(errors) == 1
    assert all(word in errors[0] for word in words), errors

    checked = load_script("tools/check_dataset.py").main(["lip_sem_seg_train", "lip_sem_seg_val"])
    said = capsys.readouterr()
    assert checked == 1
    lines = [line for line in (said.out + said.err).splitlines() if "error:" in line or "problem:" in line]
    assert len(lines) == 1
    # The checker counts the label maps that hold a wrong value, the trainer stops at the first.
    if "holds the value" in words[-1]:
        assert "The value 20 occurs in" in lines[0] and "but classes are 0 to 19" in lines[0]
    else:
        assert all(word in lines[0] for word in words)


@pytest.mark.slow
def test_the_fixture_is_learned(train_net, tmp_path, monkeypatch):
    """>= 90 % of the pixels, and left told from right, within minutes; then again from the checkpoint."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_lip_fixture()
    register_lip_fixture()
    try:
        assert train_net(config=FIXTURE_RUN, options=[]) == (0, [])
        results = evaluation(tmp_path / "output")
        assert results["pACC"] >= 90 and results["mIoU"] >= 50
        for part in ("arm", "leg", "shoe"):
            assert min(results[f"IoU-{side}-{part}"] for side in ("Left", "Right")) >= 30
        checkpoint = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
        assert train_net("--eval-only", checkpoint, config=FIXTURE_RUN, output="again", options=[]) == (0, [])
        assert evaluation(tmp_path / "again") == results
    finally:
        monkeypatch.undo()
        register_lip_fixture()
