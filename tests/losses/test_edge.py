"""Edge labels against a loop over pixels and a hand-made figure; the balanced loss against torch's weighted one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ccnet_d2.losses import EdgeCrossEntropy, edge_labels

IGNORE = 255


def brute_force(label: np.ndarray) -> np.ndarray:
    """(H, W): a pixel is an edge if within one step of it, diagonals included, two labels meet."""
    height, width = label.shape
    core = np.zeros(label.shape, bool)
    for y in range(height):
        for x in range(width):
            for y2, x2 in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= y2 < height and 0 <= x2 < width and IGNORE not in (label[y, x], label[y2, x2]):
                    core[y, x] |= label[y, x] != label[y2, x2]
    out = np.zeros(label.shape, np.int64)
    for y in range(height):
        for x in range(width):
            out[y, x] = core[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any()
    out[label == IGNORE] = IGNORE
    return out


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (9, 12), (24, 17)])
@pytest.mark.parametrize("block", [1, 3])
def test_edges_equal_a_loop_over_pixels(shape, block):
    rng = np.random.default_rng(sum(shape) + block)
    for values in ([0, 1], [0, 3, 19, IGNORE], [IGNORE]):
        small = rng.choice(values, (2, -(-shape[0] // block), -(-shape[1] // block)))
        labels = np.kron(small, np.ones((1, block, block), np.int64))[:, : shape[0], : shape[1]]
        given = torch.from_numpy(labels.copy())
        edges = edge_labels(given)
        assert np.array_equal(given.numpy(), labels), "the labels were changed"
        assert edges.dtype == torch.int64 and edge_labels(given.byte()).dtype == torch.uint8
        np.testing.assert_array_equal(edges.numpy(), np.stack([brute_force(one) for one in labels]))


def test_a_straight_edge_is_four_pixels_wide_on_both_sides_alike():
    labels = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5]).expand(1, 6, 8)
    assert edge_labels(labels)[0].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 6
    assert edge_labels(labels.transpose(1, 2))[0].T.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 6


def test_no_edge_towards_what_is_ignored():
    labels = torch.tensor([[[3, 3, 3, IGNORE, IGNORE, 4, 4, 4]] * 4])
    assert edge_labels(labels)[0].tolist() == [[0, 0, 0, IGNORE, IGNORE, 0, 0, 0]] * 4
    # So padding a batch with ignored pixels changes nothing.
    labels = torch.randint(0, 3, (2, 9, 11))
    padded = F.pad(labels, (0, 5, 0, 3), value=IGNORE)
    assert torch.equal(edge_labels(padded)[:, :9, :11], edge_labels(labels))
    assert (edge_labels(labels + 7, ignore_index=8) != 8).sum() == (labels != 1).sum()


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)])
def test_edges_of_the_mirrored_are_the_mirrored_edges(dims):
    labels = torch.from_numpy(np.random.default_rng(3).choice([0, 1, 2, IGNORE], (2, 13, 16)))
    assert torch.equal(edge_labels(labels.flip(dims)), edge_labels(labels).flip(dims))


def test_wrong_labels_are_refused():
    for labels in (torch.zeros(4, 4, dtype=torch.long), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4) > 0):
        with pytest.raises(ValueError, match=r"labels must be \(B, H, W\) integers, got"):
            edge_labels(labels)


def published_loss(logits: torch.Tensor, target: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """CE2P's: torch's weighted cross entropy, each class weighted by the other's share of the batch."""
    positive, negative = ((target == kind).sum().double() for kind in (1, 0))
    weight = torch.stack([positive, negative]) / (positive + negative)
    full = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(full, target, weight.to(logits.dtype), ignore_index=IGNORE)


@pytest.mark.parametrize("align_corners", [False, True])
def test_loss_equals_the_published_formula(align_corners):
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.from_numpy(np.random.default_rng(0).choice([0, 0, 0, 0, 1, IGNORE], (2, 19, 23)))
    loss = EdgeCrossEntropy(align_corners=align_corners)(logits, target)
    expected = published_loss(logits, target, align_corners)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_few_edge_pixels_weigh_as_much_as_all_others():
    logits = torch.zeros(1, 2, 10, 10)
    logits[:, 1, 0, 0] = -3.0  # wrong on the only edge pixel, undecided elsewhere
    target = torch.zeros(1, 10, 10, dtype=torch.long)
    target[0, 0, 0] = 1
    wrong, undecided = np.log(1 + np.exp(3.0)), np.log(2)
    assert EdgeCrossEntropy()(logits, target).item() == pytest.approx((wrong + undecided) / 2, rel=1e-6)


@pytest.mark.parametrize(("value", "expected"), [(0, np.log(2) / 2), (1, np.log(2) / 2), (IGNORE, 0.0)])
def test_one_kind_of_pixel_only(value, expected):
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    loss = EdgeCrossEntropy()(logits, torch.full((1, 4, 4), value))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all() and bool(logits.grad.any()) == (value != IGNORE)


def test_full_precision_inside_autocast():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 8, 8), torch.randint(0, 2, (2, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = EdgeCrossEntropy()(logits.bfloat16(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, published_loss(logits.bfloat16().float(), target, False))


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), "logits of 3"),
        (torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), 2), "label 2 is neither a class"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), r"expected logits \(B, K, h, w\)"),
    ],
)
def test_wrong_arguments(logits, target, message):
    with pytest.raises(ValueError, match=message):
        EdgeCrossEntropy()(logits, target)


@pytest.mark.parametrize("ignore_index", [0, 1])
def test_the_ignored_label_is_none_of_the_two_classes(ignore_index):
    with pytest.raises(
        ValueError, match=f"the ignored label {ignore_index} is one of the two classes of edges"
    ):
        EdgeCrossEntropy(ignore_index=ignore_index)
