"""Divergences of class probabilities: against SciPy and against the definition, with their gradients."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from ccnet_d2.layers.region_similarity import binary_jensen_shannon, jensen_shannon


def probabilities(pixels: int = 7, classes: int = 5, batch: int = 2) -> Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(batch, pixels, classes, dtype=torch.float64)).softmax(-1)


def test_equals_scipy():
    probability = probabilities()
    table = jensen_shannon(probability)
    for image, divergence in zip(probability.numpy(), table, strict=True):
        expected = [[jensenshannon(p, q, base=2) ** 2 for q in image] for p in image]
        np.testing.assert_allclose(divergence.numpy(), expected, atol=1e-12)


def test_lies_between_zero_and_one_also_where_a_class_is_impossible():
    sure = torch.eye(3)[None].requires_grad_()
    table = jensen_shannon(sure)
    torch.testing.assert_close(table, 1 - torch.eye(3)[None])
    (grad,) = torch.autograd.grad(table.sum(), sure)
    assert grad.isfinite().all()


def test_gradient_by_differences_and_by_the_definition(monkeypatch):
    mild = torch.rand(2, 4, 3, dtype=torch.float64) + 0.5  # the slope changes fast near 0
    assert torch.autograd.gradcheck(jensen_shannon, (mild.softmax(-1).requires_grad_(),))
    probability = probabilities().requires_grad_()

    def definition(p: Tensor) -> Tensor:
        own, other = p[:, :, None], p[:, None]
        mean = (own + other) / 2
        return ((own * own.log2() + other * other.log2()) / 2 - mean * mean.log2()).sum(-1)

    weights = torch.rand(2, 7, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((definition(probability) * weights).sum(), probability)
    for chunk in (1 << 22, 100):
        monkeypatch.setattr("ccnet_d2.layers.region_similarity._CHUNK", chunk)
        table = jensen_shannon(probability)
        torch.testing.assert_close(table, definition(probability))
        (grad,) = torch.autograd.grad((table * weights).sum(), probability)
        torch.testing.assert_close(grad, expected)


def test_memory_kept_for_the_backward_pass():
    kept = []
    probability = torch.rand(1, 300, 20).softmax(-1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        jensen_shannon(probability)
    assert sum(kept) == probability.numel()


def test_binary_divergence_by_its_definition():
    probability = probabilities()
    table = binary_jensen_shannon(probability)
    for image, divergence in zip(probability, table, strict=True):
        for i, first in enumerate(image):
            best = int(first.argmax())
            for j, second in enumerate(image):
                p, q = (min(max(float(x[best]), 0.001), 0.99) for x in (first, second))
                m = (p + q) / 2
                expected = 0.5 * (
                    p * math.log(p / m)
                    + (1 - p) * math.log((1 - p) / (1 - m))
                    + q * math.log(q / m)
                    + (1 - q) * math.log((1 - q) / (1 - m))
                )
                assert float(divergence[i, j]) == pytest.approx(expected, abs=1e-12)
    assert not torch.equal(table, table.transpose(1, 2))
    inner = torch.tensor([[[0.5, 0.3, 0.2], [0.3, 0.6, 0.1], [0.2, 0.25, 0.55]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(binary_jensen_shannon, (inner.requires_grad_(),))
