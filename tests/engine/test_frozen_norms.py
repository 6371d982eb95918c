"""Frozen norms that nothing filled are told; others are not."""

import logging

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ccnet_d2.engine.frozen_norms import warn_of_idle_norms
from ccnet_d2.engine.training import train


def told(model, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_idle_norms(model)
    return caplog.text


def test_norms_that_pass_everything_on_are_named(caplog):
    model = nn.ModuleDict(
        {"backbone": FrozenBatchNorm2d(4), "head": FrozenBatchNorm2d(6), "other": nn.BatchNorm2d(4)}
    )
    x = torch.randn(2, 6, 3, 3)
    assert torch.allclose(model["head"](x), x, atol=1e-5)
    assert "nothing: backbone, head. No" in told(model, caplog)
    # A checkpoint that lacks them changes their variance by eps.
    model["head"].load_state_dict({}, strict=False)
    assert "nothing: backbone, head. No" in told(model, caplog)
    # As a ResNet of ImageNet fills them: with statistics, or with what Caffe's made of them.
    model["backbone"].running_mean += 0.1
    assert "nothing: head. No" in told(model, caplog)
    model["head"].weight[3] = 0.5
    assert not told(model, caplog)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_norm_that_changes_anything_is_not_named(caplog, name):
    norm = FrozenBatchNorm2d(4)
    assert told(norm, caplog)
    getattr(norm, name)[2] += 0.001
    assert not told(norm, caplog)


@pytest.mark.parametrize(("norm", "idle"), [("FrozenBN", 5), ("BN", 2)])
def test_a_training_tells_of_a_head_that_follows_a_frozen_backbone(small_run, caplog, norm, idle):
    with caplog.at_level(logging.WARNING):
        train(small_run("model.backbone.norm=FrozenBN", f"model.sem_seg_head.norm={norm}"))
    # The two of the backbone are as they were made in both.
    assert ("and 2 more. No checkpoint" in caplog.text) is (idle == 5)
    assert ("backbone.conv2.norm. No checkpoint" in caplog.text) is (idle == 2)
