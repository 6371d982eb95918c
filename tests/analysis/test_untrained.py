"""Inputs that a model is measured on, and models that find something in them without training."""

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from ccnet_d2.analysis.untrained import label_objects, label_pixels, random_images, settle


@pytest.mark.parametrize("frames", [None, 3])
def test_images_and_their_pixels(frames):
    images = random_images((40, 60), 2, frames)
    assert len(images) == 2 and all((image["height"], image["width"]) == (40, 60) for image in images)
    clip = () if frames is None else (frames,)
    for labelled, image in zip(label_pixels(images, 5), images, strict=True):
        assert image["image"].shape == (*clip, 3, 40, 60) and image["image"].dtype == torch.uint8
        assert labelled["image"] is image["image"] and labelled["sem_seg"].shape == (*clip, 40, 60)
        assert labelled["sem_seg"].unique().tolist() == [0, 1, 2, 3, 4]


def test_objects_lie_in_their_image_and_are_of_its_size():
    height, width = 40, 400
    images = label_objects(random_images((height, width), 3), 2)
    for instances in (image["instances"] for image in images):
        x0, y0, x1, y1 = instances.gt_boxes.tensor.unbind(1)
        assert instances.image_size == (height, width) and len(instances) == 8
        for low, high, side in ((x0, x1, width), (y0, y1, height)):
            assert (low >= 0).all() and (high <= side).all()
            assert (high - low >= side / 4 - 1e-3).all() and (high - low <= side / 2 + 1e-3).all()
        areas = torch.as_tensor(instances.gt_masks.area(), dtype=torch.float32)
        torch.testing.assert_close(areas, (x1 - x0) * (y1 - y0))
        assert set(instances.gt_classes.tolist()) <= {0, 1}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_residual_blocks_start_as_the_identity(norm):
    blocks = [BasicBlock(8, 8, norm=norm), BottleneckBlock(8, 8, bottleneck_channels=4, norm=norm)]
    x = torch.rand(2, 8, 5, 6)
    for block in settle(nn.ModuleList(blocks)).eval():
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("stages", [None, 3])
def test_detectors_keep_what_scores_low(stages):
    def predictor() -> nn.Module:
        made = nn.Module()
        made.test_score_thresh = 0.05
        return made

    model = nn.Module()
    model.roi_heads = nn.Module()
    own = [predictor() for _ in range(stages or 1)]
    model.roi_heads.box_predictor = nn.ModuleList(own) if stages else own[0]
    assert settle(model) is model and [stage.test_score_thresh for stage in own] == [0.0] * len(own)
