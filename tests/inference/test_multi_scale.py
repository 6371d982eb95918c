import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ccnet_d2.errors import UserError
from ccnet_d2.inference import MultiScaleFlip, SlidingWindow, WholeImage, build_mode
from ccnet_d2.inference.build import MODE_NAMES


def as_input(image, height=None, width=None):
    return [{"image": image, "height": height or image.shape[-2], "width": width or image.shape[-1]}]


def bilinear(image, size, align_corners):
    """(C, h, w) -> (C, H, W) by two matrices of interpolation weights, in double precision."""
    out = image.double().numpy()
    for axis, new in ((1, size[0]), (2, size[1])):
        old = image.shape[axis]
        at = np.arange(new)
        if align_corners:
            source = at * (old - 1) / max(new - 1, 1)
        else:
            source = np.clip((at + 0.5) * old / new - 0.5, 0, None)
        low = np.minimum(source.astype(int), old - 1)
        weights = np.zeros((new, old))
        weights[at, low] += 1 - (source - low)
        weights[at, np.minimum(low + 1, old - 1)] += source - low
        out = np.moveaxis(np.tensordot(weights, out, axes=(1, axis)), 0, axis)
    return torch.from_numpy(out)


@pytest.mark.parametrize("align_corners", [False, True])
def test_probabilities_are_averaged_over_scales_and_flips(make_segmenter, random_image, align_corners):
    model = make_segmenter(align_corners=align_corners).double()
    image, answer = random_image(30, 42), (36, 40)
    scales = (0.5, 1.0, 1.3)
    expected = torch.zeros(5, *answer, dtype=torch.float64)
    for scale in scales:
        size = round(30 * scale), round(42 * scale)
        scaled = bilinear(image, size, align_corners)
        for flip in (False, True):
            seen = torch.from_numpy(scaled.numpy()[:, :, ::-1].copy()) if flip else scaled
            with torch.no_grad():
                logits = model.convs(((seen - model.pixel_mean) / 60)[None])
            probabilities = bilinear(logits[0], answer, align_corners).softmax(0)
            expected += probabilities.flip(-1) if flip else probabilities
    expected /= 2 * len(scales)

    result = MultiScaleFlip(model, scales=scales)(as_input(image, *answer))[0]["sem_seg"]
    torch.testing.assert_close(result.softmax(0).double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(result.double().exp(), expected, atol=2e-5, rtol=0)


def test_scale_one_without_flip_is_the_whole_image(make_segmenter, random_image):
    model = make_segmenter()
    inputs = as_input(random_image(31, 45))
    whole = WholeImage(model)(inputs)[0]["sem_seg"].softmax(0)
    answer = MultiScaleFlip(model, scales=[1], flip=False)(inputs)[0]["sem_seg"]
    torch.testing.assert_close(answer.softmax(0), whole, atol=1e-6, rtol=0)


def test_a_mirrored_image_gives_the_mirrored_answer(make_segmenter, random_image):
    """The mean over an image and its mirror image is symmetric, whatever the network."""
    model = make_segmenter(stride=1)
    image = random_image(20, 30)
    mode = MultiScaleFlip(model, scales=[1.0])
    plain, mirrored = (mode(as_input(one))[0]["sem_seg"] for one in (image, image.flip(-1)))
    torch.testing.assert_close(mirrored.flip(-1), plain, atol=1e-5, rtol=0)
    alone = WholeImage(model)(as_input(image.flip(-1)))[0]["sem_seg"].flip(-1)
    assert (alone - WholeImage(model)(as_input(image))[0]["sem_seg"]).abs().max() > 1e-2


def test_paired_classes_change_places_under_the_mirror():
    class LeftAndRight(torch.nn.Module):
        """Class 1 on the left half of the picture, class 2 on the right, whatever it shows."""

        def forward(self, inputs):
            sem_seg = torch.zeros(3, inputs[0]["height"], inputs[0]["width"])
            half = inputs[0]["width"] // 2
            sem_seg[1, :, :half] = 5
            sem_seg[2, :, half:] = 5
            return [{"sem_seg": sem_seg}]

    inputs = as_input(torch.zeros(3, 4, 8))
    kept = MultiScaleFlip(LeftAndRight(), scales=[1], flip_pairs=[(1, 2)])(inputs)[0]["sem_seg"]
    torch.testing.assert_close(
        kept.softmax(0).double(), WholeImage(LeftAndRight())(inputs)[0]["sem_seg"].double().softmax(0)
    )
    blurred = MultiScaleFlip(LeftAndRight(), scales=[1])(inputs)[0]["sem_seg"]
    torch.testing.assert_close(blurred[1], torch.flip(blurred[2], [-1]).flip(-1))


def test_sure_answers_stay_finite(random_image):
    class Sure(torch.nn.Module):
        def forward(self, inputs):
            sem_seg = torch.full((2, inputs[0]["height"], inputs[0]["width"]), -1e4)
            sem_seg[0] = 1e4
            return [{"sem_seg": sem_seg}]

    answer = MultiScaleFlip(Sure(), scales=[0.5, 1])(as_input(random_image(8, 8)))[0]["sem_seg"]
    assert answer.isfinite().all()
    assert (answer.argmax(0) == 0).all()


def test_combined_with_tiles_each_scale_is_cut(make_segmenter, random_image):
    model = make_segmenter()
    image, answer = random_image(40, 40), (40, 40)
    expected = torch.zeros(5, *answer)
    for scale in (0.5, 1.0, 1.5):
        size = int(40 * scale), int(40 * scale)
        scaled = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
        for flip in (False, True):
            seen = scaled.flip(-1) if flip else scaled
            inner = SlidingWindow(model, tile=24, stride=16)(as_input(seen, *answer))[0]["sem_seg"]
            probabilities = inner.softmax(0)
            expected += probabilities.flip(-1) if flip else probabilities
    expected /= 6

    mode = MultiScaleFlip(SlidingWindow(tile=24, stride=16), scales=[0.5, 1.0, 1.5])
    model.calls.clear()
    result = mode.bind(model)(as_input(image))[0]["sem_seg"]
    torch.testing.assert_close(result.softmax(0), expected, atol=1e-5, rtol=0)
    # 20 pixels: one tile, shrunk; 40: 2 x 2; 60: 4 x 4 (60 - 24 = 36 > 2 x 16); each twice for the mirror
    assert len(model.calls) == 2 * (1 + 4 + 16)
    assert torch.equal(mode.bind(model).predict_labels(as_input(image))[0].long(), result.argmax(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_takes_resized_and_padded_images(make_segmenter, random_image, dtype):
    image = as_input(random_image(40, 56))
    for mode in (
        MultiScaleFlip(scales=(0.75, 1.0)),
        MultiScaleFlip(SlidingWindow(tile=32), scales=(0.75, 1.0)),
        SlidingWindow(tile=64, pad="mean"),
    ):
        full = mode.bind(make_segmenter())(image)[0]["sem_seg"].softmax(0)
        half = mode.bind(make_segmenter().to(dtype))(image)[0]["sem_seg"].float().softmax(0)
        assert full.std() > 0.02
        torch.testing.assert_close(half, full, atol=0.01, rtol=0)


def test_sizes_of_scaled_images_are_rounded_to_the_next_pixel(make_segmenter, random_image):
    """Halves up, as in mmsegmentation, and never to none."""
    model = make_segmenter()
    for size, scale, scaled in (((30, 42), 1.25, (38, 53)), ((31, 45), 0.5, (16, 23)), ((1, 2), 0.2, (1, 1))):
        MultiScaleFlip(model, scales=[scale], flip=False)(as_input(random_image(*size)))
        assert model.calls[-1] == [(3, *scaled)]


def test_an_image_is_not_resampled_at_scale_one(make_segmenter, random_image):
    model, image = make_segmenter(), random_image(9, 10)
    MultiScaleFlip(model, scales=[1.04], flip=False)(as_input(image))  # rounds to the image's size
    assert model.last_images[0] is image


def test_probabilities_of_half_precision_are_averaged_in_float32():
    def model(inputs):
        sem_seg = torch.tensor([0.0, 7.5], dtype=torch.bfloat16)[:, None, None].expand(2, 4, 4)
        return [{"sem_seg": sem_seg} for _ in inputs]

    answer = MultiScaleFlip(model, scales=[1])(as_input(torch.zeros(3, 4, 4)))[0]["sem_seg"]
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer[:, 0, 0].exp(), torch.tensor([0.0, 7.5]).softmax(0))
    assert answer[0, 0, 0].exp() < 1e-3  # and no share is raised to some least one


def test_the_whole_image_at_a_scale_is_resized_as_the_mode_says(make_segmenter, random_image):
    """Labels of a mode nested by `bind`."""
    for aligned in (False, True):
        mode = MultiScaleFlip(scales=[1], align_corners=aligned).bind(
            make_segmenter(align_corners=not aligned)
        )
        assert mode.model.resize_aligned() is aligned


def test_wrong_scales_are_refused():
    for scales in ([], [1.0, 0.0], [-1], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="scales must be one or more positive numbers"):
            MultiScaleFlip(scales=scales)


def test_clips_are_resized_frame_by_frame():
    clip = torch.randint(0, 256, (4, 3, 10, 12), dtype=torch.uint8)
    seen = []

    class Clips(torch.nn.Module):
        def forward(self, inputs):
            seen.append(inputs[0]["image"])
            return [{"sem_seg": torch.zeros(2, inputs[0]["height"], inputs[0]["width"])}]

    MultiScaleFlip(Clips(), scales=[2.0], flip=False)(as_input(clip))
    assert seen[0].shape == (4, 3, 20, 24)
    alone = F.interpolate(clip[2:3].float(), (20, 24), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(seen[0][2], alone)


def test_modes_by_name(make_segmenter, random_image):
    model, inputs = make_segmenter(), as_input(random_image(30, 30))
    direct = {
        "whole": WholeImage(),
        "slide": SlidingWindow(tile=20, stride=11),
        "ms": MultiScaleFlip(scales=[0.5, 1], flip=False),
        "ms-slide": MultiScaleFlip(SlidingWindow(tile=20, stride=11), scales=[0.5, 1], flip=False),
    }
    answers = []
    for name, mode in direct.items():
        named = build_mode(name, tile=20, stride=11, scales=[0.5, 1], flip=False).bind(model)
        answers.append(named(inputs)[0]["sem_seg"])
        assert torch.equal(answers[-1], mode.bind(model)(inputs)[0]["sem_seg"]), name
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    with pytest.raises(
        ValueError, match="unknown test mode 'slid': choose one of whole, slide, ms, ms-slide"
    ):
        build_mode("slid")


@pytest.mark.parametrize("name", MODE_NAMES)
def test_modes_by_name_take_every_option(name):
    mode = build_mode(
        name,
        tile=(40, 48),
        stride=(16, 24),
        tiles_per_batch=3,
        scales=[0.5, 2],
        flip=False,
        pad=[1, 2, 3],
        accumulate_on="meta",
        align_corners=True,
        smallest_tile=8,
    )
    assert mode.align_corners is True
    if name.startswith("ms"):
        assert (mode.scales, mode.flip, mode.accumulate_on) == ((0.5, 2), False, torch.device("meta"))
        mode = mode.model
    assert (mode.align_corners, mode.smallest_tile) == (True, 8)
    assert isinstance(mode, SlidingWindow if name.endswith("slide") else WholeImage)
    if name.endswith("slide"):
        assert (mode.tile, mode.stride, mode.tiles_per_batch) == ((40, 48), (16, 24), 3)
        assert (mode.pad, mode.accumulate_on) == ((1, 2, 3), torch.device("meta"))


@pytest.mark.parametrize("scale", [3e5, 1e9, 1e30])
def test_a_scale_that_no_memory_holds_is_named(make_segmenter, random_image, scale):
    mode = MultiScaleFlip(make_segmenter(), scales=[1, scale])
    with pytest.raises(
        UserError, match=f"the scale {scale:g} makes an image of 42x30 one of ".replace("+", "[+]")
    ):
        mode(as_input(random_image(30, 42)))
