"""Boundary masks against SciPy's distance transforms, and the loss against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

from ccnet_d2.losses import BoundaryLoss, label_boundaries


def labels(seed: int = 0, size: tuple[int, int] = (20, 26)) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    blocks = rng.choice([0, 1, 2, 255], (2, size[0] // 4 + 1, size[1] // 5 + 1), p=[0.4, 0.3, 0.2, 0.1])
    return torch.from_numpy(np.kron(blocks, np.ones((4, 5), int))[:, : size[0], : size[1]].copy())


@pytest.mark.parametrize("radius", [1, 1.5, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_distance_transform_for_each_class(radius, seed):
    target = labels(seed)
    found = label_boundaries(target, radius).numpy()
    for image, mask in zip(target.numpy(), found, strict=True):
        expected = np.zeros(image.shape, bool)
        for c in (0, 1, 2):
            others = (image != c) & (image != 255)
            if others.any():
                expected |= (image == c) & (distance_transform_edt(~others) <= radius)
        np.testing.assert_array_equal(mask, expected)
        assert 0 < mask.sum() < mask.size


def test_no_boundary_where_there_is_one_class_and_on_maps_smaller_than_the_radius():
    assert not label_boundaries(torch.zeros(1, 6, 6, dtype=torch.long)).any()
    assert not label_boundaries(torch.full((1, 6, 6), 255)).any()
    assert label_boundaries(torch.tensor([[[0, 1]]]), radius=5).all()
    corner = torch.ones(1, 3, 5, dtype=torch.long)
    corner[0, 0, 0] = 0
    near = torch.ones(1, 3, 5, dtype=torch.bool)
    near[0, 2, 4] = False  # at a distance of 4.47
    assert label_boundaries(corner, radius=4.2).equal(near)
    assert label_boundaries(corner.mT, radius=4.2).equal(near.mT)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_loss_by_its_definition(balanced, align_corners):
    torch.manual_seed(0)
    target = labels()
    logits = torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    full = F.interpolate(logits, (20, 26), mode="bilinear", align_corners=align_corners)[:, 0]
    mask, valid = label_boundaries(target, 2), target != 255
    p = full.sigmoid()
    if balanced:
        edge, rest = int(mask.sum()), int((valid & ~mask).sum())
        log_edge, log_rest = -p[mask].log().sum() * rest, -(1 - p[valid & ~mask]).log().sum() * edge
        expected = (log_edge + log_rest) / (2 * edge * rest)
    else:
        expected = (-p[mask].log().sum() - (1 - p[valid & ~mask]).log().sum()) / valid.sum()
    found = BoundaryLoss(balanced=balanced, align_corners=align_corners)(logits, target)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("balanced", [False, True])
def test_at_the_map_s_size_a_cell_is_a_boundary_if_one_passes_through(balanced):
    torch.manual_seed(0)
    target = labels()[:, :20, :24]
    target[0, :5, :6] = 255  # a cell without any label
    logits = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    mask, valid = label_boundaries(target, 1), target != 255
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    cells = []
    for image in range(2):
        for row in range(4):
            for column in range(4):
                inside = (image, slice(5 * row, 5 * row + 5), slice(6 * column, 6 * column + 6))
                if valid[inside].any():
                    cells.append((logits[image, 0, row, column].sigmoid(), bool(mask[inside].any())))
    share = sum(edge for _, edge in cells) / len(cells)
    assert 0 < share < 1 and len(cells) == 31
    for p, edge in cells:
        weight = (1 - share if edge else share) if balanced else 1.0
        total = total - weight * (p if edge else 1 - p).log()
        weights += weight
    found = BoundaryLoss(radius=1, balanced=balanced, resolution="map")(logits, target)
    torch.testing.assert_close(found, total / weights)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, total / weights)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("pixels", "cells"), [(769, 97), (97, 13), (65, 17), (65, 5), (30, 5)])
def test_with_aligned_corners_a_boundary_belongs_to_the_cell_that_stands_next_to_it(pixels, cells):
    step = (pixels - 1) / (cells - 1)
    loss = BoundaryLoss(radius=1, resolution="map", align_corners=True)
    for first in range(1, pixels, pixels // 24 | 1):  # odd, so that it meets every place within a cell
        target = torch.zeros(1, 4, pixels, dtype=torch.long)
        target[..., first:] = 1
        logits = torch.zeros(1, 1, 1, cells, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logits, target), logits)
        found = (gradient[0, 0, 0] < 0).nonzero()[:, 0]  # cells that are to become boundaries
        assert len(found) in (1, 2)
        # Half a cell, and half a pixel to between the two of the boundary; cells of fractional size share a pixel.
        reach = step / 2 + (0.5 if step.is_integer() else 2)
        assert ((found * step - (first - 0.5)).abs() <= reach).all(), (first, found)


def cells_of(pixel: int, pixels: int, cells: int) -> list[int]:
    """Where the loss of a row of pixels, one of which has a label, has a gradient."""
    target = torch.full((1, 1, pixels), 255)
    target[..., pixel] = 0
    logits = torch.zeros(1, 1, 1, cells, requires_grad=True)
    loss = BoundaryLoss(resolution="map", align_corners=True)(logits, target)
    return torch.autograd.grad(loss, logits)[0][0, 0, 0].nonzero()[:, 0].tolist()


def test_with_aligned_corners_every_pixel_is_in_the_cell_next_to_it():
    """And in that one alone, where the cells are of whole pixels; none is lost where they are smaller than two."""
    assert all(cells_of(pixel, 769, 97) == [(pixel + 4) // 8] for pixel in range(769))
    for cells in (4, 5, 6, 8, 9):
        for pixel in range(9):
            found = cells_of(pixel, 9, cells)
            assert found and all(abs(cell * 8 / (cells - 1) - pixel) <= 2 for cell in found)


@pytest.mark.parametrize("ignore_index", [-1, 7])
@pytest.mark.parametrize("resolution", ["labels", "map"])
def test_another_label_than_255_may_be_void(ignore_index, resolution):
    target = labels()
    other = target.masked_fill(target == 255, ignore_index)
    assert label_boundaries(other, ignore_index=ignore_index).equal(label_boundaries(target, 2.0))
    logits = torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    loss = BoundaryLoss(ignore_index=ignore_index, resolution=resolution)
    assert loss(logits, other) == BoundaryLoss(resolution=resolution)(logits, target)


def test_a_thin_boundary_is_certain_at_the_map_s_size_alone():
    """What a map of stride 8 learns of a wall two pixels wide, of which it knows no more than the cell it is in."""
    target = torch.zeros(7, 32, 64, dtype=torch.long)
    for image in range(7):
        target[image, :, 33 + image :] = 1
    found = {}
    for resolution in ("labels", "map"):
        loss = BoundaryLoss(radius=1, resolution=resolution)
        logits = torch.zeros(1, 1, 4, 8, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.5)
        for _ in range(100):
            optimizer.zero_grad()
            loss(logits.expand(7, -1, -1, -1), target).backward()
            optimizer.step()
        found[resolution] = logits.detach().sigmoid()[0, 0]
    assert found["map"][:, 4].min() > 0.95 and found["map"][:, [0, 1, 2, 3, 5, 6, 7]].max() < 0.05
    assert 0.2 < found["labels"].max() < 0.5


def test_no_labels_give_zero_with_a_graph_and_half_precision_counts_as_full():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    for balanced in (False, True):
        for resolution in ("labels", "map"):
            loss = BoundaryLoss(balanced=balanced, resolution=resolution)(logits, torch.full((1, 8, 8), 255))
            loss.backward()
            assert loss == 0 and (logits.grad == 0).all()
    target = labels()[:1, :8, :8]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = BoundaryLoss()(logits.bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, BoundaryLoss()(logits.bfloat16().float(), target))


@pytest.mark.parametrize("logit", [1e4, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("resolution", ["labels", "map"])
@pytest.mark.parametrize("balanced", [False, True])
def test_whatever_a_network_says_of_void_does_not_count(balanced, resolution, logit):
    """Infinity times a weight of 0 was NaN."""
    target = labels()
    void = target == 255
    assert void.any()
    logits = torch.randn(2, 1, 20, 26, generator=torch.Generator().manual_seed(0))
    loss, found = BoundaryLoss(balanced=balanced, resolution=resolution), []
    for values in (logits, logits.masked_fill(void[:, None], logit)):
        values.requires_grad_()
        value = loss(values, target)
        found.append((value, torch.autograd.grad(value, values)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][0] > 0 and not found[0][1][:, 0][void].any()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="radius must be at least 1"):
        BoundaryLoss(radius=0.5)
    with pytest.raises(ValueError, match="resolution='cells' is not one of 'labels', 'map'"):
        BoundaryLoss(resolution="cells")
    with pytest.raises(ValueError, match="one channel, got 2"):
        BoundaryLoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected boundary logits \(B, K, h, w\) and labels \(B, H, W\)"):
        BoundaryLoss()(torch.zeros(2, 1, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))
