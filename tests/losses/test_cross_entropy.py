import math

import pytest
import torch

from ccnet_d2.losses import CrossEntropy, EdgeCrossEntropy, OHEMCrossEntropy


def bilinear(channel, size, align_corners):
    """One output pixel at a time, of a nested list of floats."""
    height, width = len(channel), len(channel[0])

    def place(i, length, out_length):
        if align_corners:
            return i * (length - 1) / (out_length - 1) if out_length > 1 else 0.0
        return max((i + 0.5) * length / out_length - 0.5, 0.0)

    out = []
    for i in range(size[0]):
        row = []
        for j in range(size[1]):
            y, x = place(i, height, size[0]), place(j, width, size[1])
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = channel[y0][x0] * (1 - x + x0) + channel[y0][x1] * (x - x0)
            bottom = channel[y1][x0] * (1 - x + x0) + channel[y1][x1] * (x - x0)
            row.append(top * (1 - y + y0) + bottom * (y - y0))
        out.append(row)
    return out


def by_loops(logits, target, align_corners, weight=None):
    total = mass = 0.0
    for image, labels in zip(logits.tolist(), target.tolist(), strict=True):
        full = [bilinear(channel, (len(labels), len(labels[0])), align_corners) for channel in image]
        for i, row in enumerate(labels):
            for j, label in enumerate(row):
                if label == 255:
                    continue
                scores = [channel[i][j] for channel in full]
                top = max(scores)
                log_sum = top + math.log(sum(math.exp(s - top) for s in scores))
                w = 1.0 if weight is None else weight[label]
                total += w * (log_sum - scores[label])
                mass += w
    return total / mass


def sample(size=(3, 4), full=(9, 7), classes=4, dtype=torch.float64):
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, classes, *size, dtype=dtype)
    target = torch.randint(0, classes, (2, *full))
    target[torch.rand(target.shape) < 0.3] = 255
    return logits.requires_grad_(), target


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weight", [None, [0.8373, 2.0, 0.0, 1.0345]])  # half precision has none like them
@pytest.mark.parametrize("full", [(9, 7), (3, 4)])
def test_against_loops(align_corners, weight, full):
    logits, target = sample(full=full)
    arguments = {"align_corners": True} if align_corners else {}  # not aligned unless asked for
    loss = CrossEntropy(class_weight=weight, **arguments)(logits, target)
    assert loss.shape == () and loss.item() == pytest.approx(by_loops(logits, target, align_corners, weight))


def test_gradient():
    logits, target = sample()
    assert torch.autograd.gradcheck(lambda x: CrossEntropy()(x, target), (logits,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("loss", [CrossEntropy(), OHEMCrossEntropy(min_kept=10), EdgeCrossEntropy()])
def test_every_integer_label_dtype(loss, dtype):
    logits, target = sample(classes=2)
    assert loss(logits, target.to(dtype)) == loss(logits, target) > 0


def test_all_ignored_is_zero_with_a_graph():
    logits, target = sample()
    for weight in (None, [1.0, 2.0, 3.0, 4.0]):
        logits.grad = None
        loss = CrossEntropy(class_weight=weight)(logits, torch.full_like(target, 255))
        loss.backward()
        assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_the_mean_of_one_pixel_is_its_own_whatever_its_weight():
    logits, target = sample()
    lone = torch.full_like(target, 255)
    lone[0, 4, 3] = 1
    expected = CrossEntropy()(logits, lone)
    torch.testing.assert_close(CrossEntropy(class_weight=[0.1] * 4)(logits, lone), expected)


@pytest.mark.parametrize("ignore_index", [-1, 7])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (CrossEntropy, {}),
        (CrossEntropy, {"class_weight": [0.5, 2.0]}),
        (OHEMCrossEntropy, {"min_kept": 40, "factor": 1}),
        (OHEMCrossEntropy, {"min_kept": 40, "factor": 2}),
        (EdgeCrossEntropy, {}),
    ],
)
def test_another_label_than_255_may_be_void(loss, options, ignore_index):
    logits, target = sample(classes=2)
    other = target.masked_fill(target == 255, ignore_index)
    assert loss(ignore_index=ignore_index, **options)(logits, other) == loss(**options)(logits, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_inside_autocast(dtype):
    logits, target = sample(dtype=torch.float32)
    low = logits.detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CrossEntropy()(low, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, CrossEntropy()(low.float(), target))


def test_weights_follow_the_module():
    module = CrossEntropy(class_weight=[1.0, 2.0])
    assert dict(module.named_buffers())["class_weight"].tolist() == [1.0, 2.0]
    assert not module.state_dict()


def test_labels_are_looked_at_on_the_cpu_alone():
    """On a GPU one would have to wait for them; on this device there are none."""
    logits, target = (one.to("meta") for one in sample())
    assert CrossEntropy()(logits, target).device.type == "meta"


def test_without_gradients_no_process_waits_for_the_others(monkeypatch):
    """They may evaluate different numbers of images. Here another process has three times as many pixels."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda mass: mass.mul_(4))
    logits, target = sample()
    expected = by_loops(logits, target, False)
    assert CrossEntropy()(logits, target).item() == pytest.approx(2 * expected / 4)
    with torch.no_grad():
        assert CrossEntropy()(logits, target).item() == pytest.approx(expected)


def test_errors():
    logits, target = sample()
    for labels, message in (
        (target.float(), "labels must be integers, got torch.float32"),
        (target.cfloat(), "labels must be integers, got torch.complex64"),
        (target > 0, "labels must be integers, got torch.bool"),
        (target[0], r"expected logits \(B, K, h, w\) and labels \(B, H, W\)"),
        (target[:, None], r"expected logits \(B, K, h, w\) and labels \(B, H, W\)"),
        (target[:1], "with one B"),
        (target.masked_fill(target == 255, 19), r"label 19 is neither a class \(0 to 3\) nor the ignored"),
        (target.masked_fill(target == 255, 4), r"label 4 is neither a class \(0 to 3\)"),
        (target.masked_fill(target == 255, -1), "label -1 is neither"),
    ):
        for loss in (CrossEntropy(), OHEMCrossEntropy()):
            with pytest.raises(ValueError, match=message):
                loss(logits, labels)
    with pytest.raises(
        ValueError, match=r"expected logits \(B, K, h, w\) .*, got \(2, 4, 4\) and \(2, 9, 7\)"
    ):
        CrossEntropy()(logits[:, :, 0], target)
    # Labels of this package's mappers, and the ignored label as it is in the files: the files are not at fault.
    with pytest.raises(
        ValueError, match=r"nor the ignored label 11: SemSegMapper gives void .* leave ignore_value"
    ):
        CrossEntropy(ignore_index=11)(logits, target)
    with pytest.raises(ValueError, match="2 class weights given for logits of 4 classes"):
        CrossEntropy(class_weight=[1.0, 2.0])(logits, target)
