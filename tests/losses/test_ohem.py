import math

import pytest
import torch
import torch.nn.functional as F

from ccnet_d2.losses import CrossEntropy, OHEMCrossEntropy
from ccnet_d2.losses.ohem import sample_probability
from ccnet_d2.losses.resize import sample_labels


def probabilities(logits):
    """Nested lists [image][class][row][column] of softmax values."""
    return logits.detach().softmax(dim=1).tolist()


def corner_grid(length, out_length):
    """Where the outputs of a corner-aligned reduction lie on the input."""
    return [i * (length - 1) / (out_length - 1) if out_length > 1 else 0.0 for i in range(out_length)]


def hard_by_loops(logits, target, thresh, min_kept, factor):
    """The official procedure, pixel by pixel; logits at full resolution."""
    probability, labels = probabilities(logits), target.tolist()
    height, width = target.shape[1:]
    ys = corner_grid(height, max(1, round(height / factor)))
    xs = corner_grid(width, max(1, round(width / factor)))
    found = []
    for image, rows in zip(probability, labels, strict=True):
        for y in ys:
            for x in xs:
                label = rows[math.floor(y + 0.5)][math.floor(x + 0.5)]
                if label == 255:
                    continue
                p = image[label]
                y0, x0 = int(y), int(x)
                y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                top = p[y0][x0] * (1 - x + x0) + p[y0][x1] * (x - x0)
                bottom = p[y1][x0] * (1 - x + x0) + p[y1][x1] * (x - x0)
                found.append(top * (1 - y + y0) + bottom * (y - y0))
    k = min_kept // factor**2
    if k >= len(found):
        threshold = 1.0
    elif k == 0:
        threshold = thresh
    else:
        threshold = max(thresh, sorted(found)[k - 1])
    keep = torch.zeros_like(target, dtype=torch.bool)
    for b, rows in enumerate(labels):
        for i, row in enumerate(rows):
            for j, label in enumerate(row):
                keep[b, i, j] = label != 255 and probability[b][label][i][j] <= threshold + 1e-12
    return keep, threshold


def sample(full=(41, 50), classes=5, sharpness=3.0, ignored=0.3):
    torch.manual_seed(0)
    target = torch.randint(0, classes, (2, *full))
    logits = torch.randn(2, classes, *full, dtype=torch.float64)
    logits += sharpness * F.one_hot(target, classes).permute(0, 3, 1, 2)
    target[torch.rand(target.shape) < ignored] = 255
    return logits.requires_grad_(), target


def mean_over(keep, logits, target):
    """Of what torch computes of every pixel; 0 if none is kept."""
    losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    return losses[keep].sum() / max(int(keep.sum()), 1)


CASES = [  # thresh, min_kept, factor, and what they exercise
    (0.7, 10, 8, "thresh"),
    (0.7, 2000, 8, "kth"),
    (0.7, 100_000, 8, "all"),
    (0.7, 0, 8, "thresh"),
    (0.2, 1500, 3, "kth"),
    (0.7, 2000, 1, "kth"),
    (0.7, 100, 1, "thresh"),
    (0.7, 10_000, 1, "all"),
]


@pytest.mark.parametrize(("thresh", "min_kept", "factor", "case"), CASES)
def test_against_loops(thresh, min_kept, factor, case):
    logits, target = sample()
    keep, threshold = hard_by_loops(logits, target, thresh, min_kept, factor)
    valid = target != 255
    if case == "kth":
        assert thresh < threshold < 1
    else:
        assert threshold == (1.0 if case == "all" else thresh)
        assert (keep.sum() == valid.sum()) == (case == "all")
    loss = OHEMCrossEntropy(thresh=thresh, min_kept=min_kept, factor=factor)(logits, target)
    expected = mean_over(keep, logits, target)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_logits_are_enlarged_first():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randint(0, 3, (2, 41, 33))
    for align_corners in (True, False):
        full = F.interpolate(logits, (41, 33), mode="bilinear", align_corners=align_corners)
        loss = OHEMCrossEntropy(align_corners=align_corners, min_kept=1000)
        assert loss(logits, target) == loss(full, target)
        # Aligned unless told otherwise.
        assert (OHEMCrossEntropy(min_kept=1000)(logits, target) == loss(logits, target)) == align_corners


def test_full_resolution_keeps_min_kept_pixels_exactly():
    logits, target = sample(sharpness=20.0)
    keep, _ = hard_by_loops(logits, target, 0.7, 123, 1)
    assert keep.sum() == 123
    loss = OHEMCrossEntropy(min_kept=123, factor=1)
    log_probability = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    torch.testing.assert_close(loss(logits, target), log_probability.flatten().topk(123).values.mean())


def test_few_labels_and_a_threshold_of_1_give_plain_cross_entropy():
    logits, target = sample()
    everything = CrossEntropy(align_corners=True)(logits, target)
    torch.testing.assert_close(OHEMCrossEntropy()(logits, target), everything)
    torch.testing.assert_close(OHEMCrossEntropy(thresh=1, min_kept=0)(logits, target), everything)
    assert OHEMCrossEntropy(thresh=0, min_kept=0)(logits, target) == 0


def test_exactly_min_kept_labels_keep_every_pixel():
    logits, target = sample(full=(40, 40), ignored=0.0)
    target[:, 0, 0] = 255  # a corner is a sample: 2 images of 5x5 samples have 48 labels
    everything = CrossEntropy()(logits, target)
    torch.testing.assert_close(OHEMCrossEntropy(min_kept=48 * 64)(logits, target), everything)
    assert OHEMCrossEntropy(min_kept=47 * 64)(logits, target) > everything


@pytest.mark.parametrize("factor", [1, 8])
def test_nothing_to_learn_is_zero_with_a_graph(factor):
    logits, target = sample(sharpness=50.0)
    for labels, min_kept in ((torch.full_like(target, 255), 100_000), (target, 0)):
        logits.grad = None
        loss = OHEMCrossEntropy(min_kept=min_kept, factor=factor)(logits, labels)
        loss.backward()
        assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 8), (12, 20)])
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_small_images(size, samples):
    """As large as a few samples or less, of which there is one at least for each axis."""
    logits, target = sample(full=size, ignored=0.0, sharpness=1.0)
    keep, _ = hard_by_loops(logits, target, 0.2, 64 * samples, 8)
    loss = OHEMCrossEntropy(thresh=0.2, min_kept=64 * samples)(logits, target)
    torch.testing.assert_close(loss, mean_over(keep, logits, target))


def test_fp32_inside_autocast():
    logits, target = sample()
    low = logits.detach().bfloat16()
    loss = OHEMCrossEntropy(min_kept=2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(low, target)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(low.float(), target))


@pytest.mark.parametrize("size", [(769, 512), (50, 41), (20, 12), (9, 100)])
def test_reduction_is_that_of_scipy_zoom(size):
    """The official code reduces with scipy.ndimage.zoom, order 1 for probabilities and 0 for labels."""
    ndimage = pytest.importorskip("scipy.ndimage")
    torch.manual_seed(0)
    probability = torch.randn(1, 3, *size, dtype=torch.float64).softmax(1)
    labels = torch.randint(0, 3, (1, *size))
    coarse = ndimage.zoom(labels.numpy(), (1.0, 1 / 8, 1 / 8), order=0)
    ours = sample_labels(labels, coarse.shape[1:], align_corners=True)
    assert (round(size[0] / 8), round(size[1] / 8)) == coarse.shape[1:]
    # Where a sample lies exactly between two pixels, scipy's choice hangs on its rounding errors.
    between = [
        torch.tensor([2 * i * (n - 1) % (2 * max(m - 1, 1)) == max(m - 1, 1) for i in range(m)])
        for n, m in zip(size, coarse.shape[1:], strict=True)
    ]
    certain = ~(between[0][:, None] | between[1][None, :])
    assert certain.float().mean() > 0.5
    assert torch.equal(ours[0][certain], torch.from_numpy(coarse)[0][certain])
    maps = torch.from_numpy(ndimage.zoom(probability.numpy(), (1.0, 1.0, 1 / 8, 1 / 8), order=1))
    for label in range(3):
        read = sample_probability(probability.log(), torch.full_like(ours, label))
        torch.testing.assert_close(read, maps[:, label])


def test_defaults_are_those_of_the_official_code():
    loss = OHEMCrossEntropy()
    assert (loss.thresh, loss.min_kept, loss.factor, loss.ignore_index) == (0.7, 100_000, 8, 255)


def test_errors():
    for arguments, message in (
        ({"thresh": 1.5}, "thresh is a probability between 0 and 1, got 1.5"),
        ({"min_kept": -1}, "min_kept must not be negative"),
        ({"factor": 0}, "factor must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            OHEMCrossEntropy(**arguments)
    logits, target = sample()
    with pytest.raises(ValueError, match="label 7 is neither a class"):
        OHEMCrossEntropy()(logits, target.masked_fill(target == 255, 7))
