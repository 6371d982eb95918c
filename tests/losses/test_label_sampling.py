import pytest
import torch

from ccnet_d2.losses.resize import sample_labels, upsample


@pytest.mark.parametrize(("length", "out_length"), [(769, 97), (8, 1), (5, 5), (1, 1), (10, 3), (3, 7)])
def test_middle_of_the_cell(length, out_length):
    labels = torch.arange(length).reshape(1, length, 1)
    rows = sample_labels(labels, (out_length, 1), align_corners=False)[0, :, 0]
    expected = torch.nn.functional.interpolate(
        labels[:, None, :, 0].double(), out_length, mode="nearest-exact"
    )[0, 0]
    assert torch.equal(rows, expected.long())


def test_corners_are_feature_centres_at_stride_8():
    labels = torch.arange(769).reshape(1, 1, 769)
    assert torch.equal(sample_labels(labels, (1, 97), align_corners=True)[0, 0], torch.arange(0, 769, 8))


def test_halves_round_up():
    labels = torch.arange(4).reshape(1, 1, 4)
    assert sample_labels(labels, (1, 3), align_corners=True)[0, 0].tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_dtype_and_identity(dtype):
    labels = torch.randint(0, 200, (2, 6, 5), dtype=dtype)
    for align_corners in (False, True):
        assert torch.equal(sample_labels(labels, (6, 5), align_corners), labels)


def test_upsample_leaves_maps_of_that_size_alone():
    logits = torch.randn(1, 2, 3, 4)
    assert upsample(logits, (3, 4), False) is logits
    assert upsample(logits, (6, 8), False).shape == (1, 2, 6, 8)
