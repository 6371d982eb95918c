import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ccnet_d2.inference import MultiScaleFlip, SlidingWindow, WholeImage
from ccnet_d2.windows import window_starts
from tests.test_windows import starts_by_moving_back


def slide_by_sums(model, image, tile, stride):
    """Sums and counts over the whole image, one tile after the other, in double precision."""
    _, height, width = image.shape
    total = counts = None
    for top in starts_by_moving_back(height, tile[0], stride[0]):
        for left in starts_by_moving_back(width, tile[1], stride[1]):
            part = image[:, top : top + tile[0], left : left + tile[1]]
            h, w = part.shape[1:]
            with torch.no_grad():
                logits = model([{"image": part, "height": h, "width": w}])[0]["sem_seg"].double()
            if total is None:
                total = torch.zeros(len(logits), height, width, dtype=torch.float64)
                counts = torch.zeros(height, width, dtype=torch.float64)
            total[:, top : top + h, left : left + w] += logits
            counts[top : top + h, left : left + w] += 1
    return total / counts


def as_input(image, height=None, width=None):
    return [{"image": image, "height": height or image.shape[-2], "width": width or image.shape[-1]}]


def test_official_setting_gives_eight_tiles():
    mode = SlidingWindow(tile=769)
    assert mode.stride == (513, 513)
    assert len(window_starts(1024, 769, 513)) * len(window_starts(2048, 769, 513)) == 8
    assert window_starts(2048, 769, 513) == [0, 513, 1026, 1279]


@pytest.mark.parametrize("pad", [None, "mean"])
@pytest.mark.parametrize("answer", [(33, 47), (70, 50)])
def test_one_tile_of_the_images_size_equals_whole(make_segmenter, random_image, pad, answer):
    model = make_segmenter()
    inputs = as_input(random_image(33, 47), *answer)
    whole = WholeImage(model)(inputs)[0]["sem_seg"]
    slid = SlidingWindow(model, tile=(33, 47), pad=pad)(inputs)[0]["sem_seg"]
    assert slid.shape == (5, *answer)
    if answer == (33, 47):
        assert torch.equal(slid, whole)
    else:  # the model resizes its stride-2 logits once, the window resizes full-size logits
        slid_labels, labels = slid.argmax(0), whole.argmax(0)
        assert (slid_labels == labels).float().mean() > 0.8


def test_one_tile_equals_whole_for_the_ccnet_meta_architecture():
    from detectron2.config import instantiate

    from ccnet_d2.model_zoo import get_config

    torch.manual_seed(0)
    model = instantiate(get_config("toy/ccnet_synthetic.py").model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.7)
    image = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8)
    inputs = as_input(image)
    whole = WholeImage(model)(inputs)[0]["sem_seg"]
    for mode in (
        SlidingWindow(tile=(32, 40)),
        SlidingWindow(tile=64),
        MultiScaleFlip(scales=[1], flip=False),
    ):
        answer = mode.bind(model)(inputs)[0]["sem_seg"]
        torch.testing.assert_close(answer.softmax(0), whole.softmax(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "tile", "stride"),
    [
        ((50, 70), (24, 24), (16, 16)),
        ((50, 70), (24, 30), (24, 30)),  # no overlap, except for the tiles moved inside
        ((41, 37), (16, 16), (5, 3)),  # up to six tiles on a pixel
        ((17, 90), (32, 32), (20, 20)),  # lower than the tile
        ((90, 17), (32, 32), (20, 20)),
        ((33, 33), (32, 32), (32, 32)),  # the second tile is moved back by all but one pixel
        ((1, 1), (4, 4), (2, 2)),
        ((46, 55), (16, 20), (15, 19)),  # a single row and column shared
    ],
)
@pytest.mark.parametrize("tiles_per_batch", [1, 3])
def test_logits_equal_plain_sums_over_counts(
    make_segmenter, random_image, size, tile, stride, tiles_per_batch
):
    model = make_segmenter()
    image = random_image(*size)
    expected = slide_by_sums(model, image, tile, stride)
    mode = SlidingWindow(model, tile=tile, stride=stride, tiles_per_batch=tiles_per_batch)
    answer = mode(as_input(image))[0]["sem_seg"]
    torch.testing.assert_close(answer.double(), expected, atol=1e-5, rtol=1e-5)
    labels = mode.predict_labels(as_input(image))[0]
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), answer.argmax(0))


def test_tiles_go_to_the_model_in_batches(make_segmenter, random_image):
    model = make_segmenter()
    SlidingWindow(model, tile=16, stride=16, tiles_per_batch=4)(as_input(random_image(32, 48)))
    assert [len(call) for call in model.calls] == [4, 2]
    assert {shape for call in model.calls for shape in call} == {(3, 16, 16)}


@pytest.mark.parametrize("answer", [(100, 61), (31, 200)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_answers_of_another_size_are_resized_after_averaging(
    make_segmenter, random_image, answer, align_corners
):
    model = make_segmenter(align_corners=align_corners)
    image = random_image(60, 44)
    expected = F.interpolate(
        slide_by_sums(model, image, (24, 24), (16, 16))[None],
        answer,
        mode="bilinear",
        align_corners=align_corners,
    )[0]
    mode = SlidingWindow(model, tile=24, stride=16)
    logits = mode(as_input(image, *answer))[0]["sem_seg"]
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    labels = mode.predict_labels(as_input(image, *answer))[0].long()
    assert labels.shape == answer
    # Rounding may decide between two classes of equal logits.
    different = labels != expected.argmax(0)
    top_two = expected.topk(2, dim=0).values
    assert (top_two[0] - top_two[1])[different].le(1e-5).all()


def test_small_images_are_padded_with_the_pixel_mean(make_segmenter, random_image):
    model = make_segmenter()
    image = random_image(10, 40)
    padded = model.pixel_mean.expand(3, 24, 40).clone()
    padded[:, :10] = image
    expected = slide_by_sums(model, padded, (24, 24), (16, 16))[:, :10]
    for pad in ("mean", [123.0, 116.0, 103.0]):
        answer = SlidingWindow(model, tile=24, stride=16, pad=pad)(as_input(image))[0]["sem_seg"]
        torch.testing.assert_close(answer.double(), expected, atol=1e-5, rtol=1e-5)
    assert model.calls[-1] == [(3, 24, 24)]
    SlidingWindow(model, tile=24, stride=16)(as_input(image))
    assert model.calls[-1] == [(3, 10, 24)]


def test_more_than_255_classes_need_two_bytes(make_segmenter, random_image):
    mode = SlidingWindow(make_segmenter(300), tile=16)
    inputs = as_input(random_image(20, 20))
    labels = mode.predict_labels(inputs)[0]
    assert labels.dtype == torch.int16
    assert torch.equal(labels.long(), mode(inputs)[0]["sem_seg"].argmax(0))


def test_half_precision_logits_are_averaged_in_float32(random_image):
    class Half(nn.Module):
        def forward(self, inputs):
            return [{"sem_seg": torch.full((2, i["height"], i["width"]), 0.1).half()} for i in inputs]

    answer = SlidingWindow(Half(), tile=8, stride=3, accumulate_on="cpu")(as_input(random_image(20, 20)))
    assert answer[0]["sem_seg"].dtype == torch.float32
    torch.testing.assert_close(answer[0]["sem_seg"], torch.full((2, 20, 20), 0.1), atol=1e-4, rtol=0)


def test_the_models_own_tensors_are_not_written_to(random_image):
    kept = torch.ones(2, 8, 8)

    class Keeps(nn.Module):
        def forward(self, inputs):
            return [{"sem_seg": kept} for _ in inputs]

    SlidingWindow(Keeps(), tile=8, stride=4)(as_input(random_image(20, 20)))
    assert torch.equal(kept, torch.ones(2, 8, 8))


class LargestFloatTensor(TorchDispatchMode):
    """Notes the largest number of elements of any floating tensor an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("answer_scale", [1, 0.5])
def test_memory_for_labels_does_not_grow_with_height(make_segmenter, random_image, answer_scale):
    model = make_segmenter(40)
    mode = SlidingWindow(model, tile=32, stride=20)
    peaks = []
    for height in (92, 772):  # the last tile is moved back equally far
        image = random_image(height, 64)
        answer = int(height * answer_scale), int(64 * answer_scale)
        with LargestFloatTensor() as noted:
            mode.predict_labels(as_input(image, *answer))
        peaks.append(noted.largest)
    assert peaks[0] == peaks[1] <= 40 * 32 * 64


@pytest.mark.parametrize("answer", [(20, 21), (33, 30)])
def test_logits_are_summed_where_they_are_wanted(make_segmenter, random_image, answer):
    """A device that holds nothing stands for one with more memory."""
    for mode in (
        SlidingWindow(accumulate_on="meta", tile=16),
        MultiScaleFlip(scales=[1], accumulate_on="meta"),
    ):
        logits = mode.bind(make_segmenter())(as_input(random_image(20, 21), *answer))[0]["sem_seg"]
        assert logits.device.type == "meta" and logits.shape == (5, *answer)


def test_the_models_own_mean_within_other_modes_pads(make_segmenter, random_image):
    mode = SlidingWindow(WholeImage(make_segmenter()), tile=24, pad="mean")
    expected = SlidingWindow(make_segmenter(), tile=24, pad="mean")
    inputs = as_input(random_image(10, 40))
    assert torch.equal(mode(inputs)[0]["sem_seg"], expected(inputs)[0]["sem_seg"])


def test_values_to_pad_with_are_not_rounded_to_bytes(make_segmenter, random_image):
    model = make_segmenter()
    SlidingWindow(model, tile=24, pad=[123.675, -1.5, 300.25])(as_input(random_image(10, 24)))
    (padded,) = model.last_images
    assert padded[:, 23, 5].tolist() == pytest.approx([123.675, -1.5, 300.25])


def test_nan_is_not_made_of_a_large_overlap(make_segmenter, random_image):
    mode = SlidingWindow(make_segmenter(), tile=16, stride=1)
    assert mode(as_input(random_image(20, 21)))[0]["sem_seg"].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 0}, "SlidingWindow: tile is 0, but a side, or height and width, in whole pixels above 0"),
        ({"tile": (1, 2, 3)}, r"tile is \(1, 2, 3\), but"),
        ({"tile": 384.5}, "tile is 384.5, but"),
        ({"tile": 9, "stride": (8, 4.5)}, r"SlidingWindow: stride is \(8, 4.5\), but"),
        ({"tile": 8, "stride": 9}, r"stride \(9, 9\) is larger than tile \(8, 8\)"),
        ({"tiles_per_batch": 0}, "tiles_per_batch must be at least 1"),
        ({"pad": "reflect"}, "pad must be None, 'mean' or one value per channel"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(**arguments)


@pytest.mark.parametrize("tile", [16.0, np.int64(16), (16.0, 16), [np.int64(16), 16]])
def test_tiles_in_whole_pixels_of_any_type(tile):
    mode = SlidingWindow(tile=tile)
    assert mode.tile == (16, 16) and all(type(side) is int for side in mode.tile)


def test_pad_errors(make_segmenter, random_image):
    model = make_segmenter()
    with pytest.raises(ValueError, match="pad has 2 values for an image of 3 channels"):
        SlidingWindow(model, tile=32, pad=[0, 0])(as_input(random_image(8, 8)))
    del model.pixel_mean
    with pytest.raises(ValueError, match="needs a model with 'pixel_mean', which TinySegmenter has not"):
        SlidingWindow(model, tile=32, pad="mean")(as_input(random_image(8, 8)))


def test_default_overlap_is_a_third():
    for tile in (1, 2, 3, 100, 512, 769):
        assert SlidingWindow(tile=tile).stride[0] == math.ceil(tile * 2 / 3)
