"""Pictures of a detector's predictions during training."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from ccnet_d2.data.datasets.coco_fixture import generate_coco_fixture, register_coco_fixture
from ccnet_d2.engine.pictures import draw_predictions
from ccnet_d2.model_zoo import get_config

NAME = "instance_pictures_test"


@pytest.fixture
def run(tmp_path):
    """The detector's quick schedule on a drawn set."""
    generate_coco_fixture(tmp_path / "set")
    register_coco_fixture(tmp_path / "set", NAME)
    cfg = get_config("quick_schedules/mask_rcnn_rcca_R_18_FPN_overfit.py")
    cfg.dataloader.test.dataset.names = NAME
    cfg.train.num_pictures = 2
    yield cfg
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


class OneBox(nn.Module):
    """Finds the same box in every image."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, inputs):
        instances = Instances((inputs[0]["height"], inputs[0]["width"]))
        instances.pred_boxes = Boxes(torch.tensor([[20.0, 30.0, 70.0, 90.0]]))
        instances.scores = torch.tensor([self.score])
        instances.pred_classes = torch.tensor([1])
        return [{"instances": instances}]


def panels(path):
    """The left and the right half."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return np.array_split(pixels, 2, axis=1)


def test_likely_instances_are_drawn(run, tmp_path):
    found, missed = tmp_path / "pictures/found.png", tmp_path / "pictures/missed.png"
    draw_predictions(run, OneBox(0.6), found)
    draw_predictions(run, OneBox(0.4), missed)
    (left, right), (left_missed, right_missed) = panels(found), panels(missed)
    assert (left != left_missed).any(-1).mean() > 0.01
    # The ground truth's colours are drawn at random, its places are not.
    assert (right != right_missed).any(-1).mean() < 0.5


def test_a_real_detector_in_training(run, tmp_path):
    torch.manual_seed(0)
    model = instantiate(run.model).train()
    draw_predictions(run, model, tmp_path / "one.png")
    assert model.training
    left, right = panels(tmp_path / "one.png")
    assert (left[:, : right.shape[1]] != right[:, : left.shape[1]]).any(-1).mean() > 0.01
