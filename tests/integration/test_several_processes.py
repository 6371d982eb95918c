"""train_net.py with several processes on CPUs: train, evaluate, resume, detection, and wrong input."""

import json
from pathlib import Path

import pytest
import torch

from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset, register_all
from ccnet_d2.data.datasets.coco_fixture import CocoFixtureConfig, generate_coco_fixture
from ccnet_d2.engine.command_line import main

pytestmark = pytest.mark.slow


@pytest.fixture
def train_net(tmp_path, monkeypatch, capfd):
    """Runs train_net.py with two processes; gives its status and the errors printed, of all processes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_synthetic_dataset(tmp_path / "ccnet_synthetic", SyntheticConfig(train_images=8, val_images=5))
    register_all(tmp_path)

    def run(config, *arguments, output="output"):
        options = [f"train.output_dir={tmp_path / output}", "train.num_pictures=0", "train.seed=0"]
        capfd.readouterr()
        status = main(["--config-file", config, "--num-processes", "2", *arguments, *options])
        return status, [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]

    yield run
    monkeypatch.undo()
    register_all()


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_train_evaluate_resume(train_net, tmp_path):
    # Batch norm that is not synchronised: each process has statistics of its own, and one set is evaluated.
    config = "toy/ccnet_synthetic.py"
    small = ["dataloader.train.total_batch_size=4"]
    assert train_net(config, *small, "train.max_iter=4") == (0, [])
    trained = evaluation(tmp_path / "output")
    checkpoint = f"train.init_checkpoint={tmp_path / 'output/model_final.pth'}"
    status = main(
        [
            "--config-file",
            config,
            "--eval-only",
            checkpoint,
            f"train.output_dir={tmp_path / 'alone'}",
            "train.device=cpu",
        ]
    )
    assert status == 0 and evaluation(tmp_path / "alone") == trained

    assert train_net(config, "--resume", *small, "train.max_iter=6") == (0, [])
    assert torch.load(tmp_path / "output/model_final.pth", weights_only=True)["iteration"] == 5

    status, errors = train_net(config, "dataloader.train.total_batch_size=3", output="odd")
    assert status == 1 and len(errors) == 1 and "multiple of 2" in errors[0]
    status, errors = train_net(config, "train.max_itr=3", output="wrong")
    assert status == 1 and len(errors) == 1 and "train.max_itr" in errors[0]


def test_loader_workers_take_what_the_config_file_defines(train_net, tmp_path):
    """As in one process, which forks them; a class of the file cannot be pickled."""
    config = tmp_path / "mine.py"
    config.write_text("""
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ccnet_d2.model_zoo import get_config


class Darker(T.Augmentation):
    def get_transform(self, image):
        return T.BlendTransform(0, 0.1, 0.9)


_run = get_config("toy/ccnet_synthetic.py")
model, dataloader, train = _run.model, _run.dataloader, _run.train
optimizer, lr_multiplier = _run.optimizer, _run.lr_multiplier
dataloader.train.mapper.augmentations.append(L(Darker)())
dataloader.train.num_workers = 1
dataloader.train.total_batch_size = 4
train.max_iter = 2
""")
    assert train_net(str(config)) == (0, [])


def test_yacs(tmp_path, train_net):
    options = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "2", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"]
    arguments = ["--config-file", "yacs/toy/ccnet_synthetic.yaml", "--num-processes", "2"]
    assert main([*arguments, "OUTPUT_DIR", str(tmp_path / "yacs"), *options]) == 0
    assert (tmp_path / "yacs/model_final.pth").is_file()


def test_mask_rcnn_needs_no_search_for_unused_parameters(train_net, tmp_path):
    generate_coco_fixture(tmp_path / "ccnet_coco_fixture", CocoFixtureConfig(images=4))
    config = "quick_schedules/mask_rcnn_rcca_R_18_FPN_overfit.py"
    assert train_net(config, "train.max_iter=3", "train.ddp.find_unused_parameters=False") == (0, [])
    assert set(evaluation(tmp_path / "output")) == {"bbox", "segm"}
    weights = torch.load(tmp_path / "output/model_final.pth", weights_only=True)["model"]
    gammas = [value for key, value in weights.items() if key.endswith("rcca.gamma")]
    assert gammas and all(value.abs().sum() > 0 for value in gammas)
