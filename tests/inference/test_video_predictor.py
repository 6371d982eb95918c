"""Videos in clips: every frame answered, in order, by the clips that hold it."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.inference import ClassTable, Predictor, SlidingWindow
from ccnet_d2.inference.video_predictor import ClipMerger, VideoPredictor
from ccnet_d2.model_zoo import get_config

SMALL = ["model.sem_seg_head.channels=16", "model.sem_seg_head.aux_channels=8"]
RUN = "camvid/ccnet3d_T5_R_18_D8_half.py"


def reference(count, length, stride):
    """For every frame the clips (start, length) whose mean is its answer, by simulating the whole video."""
    if count <= length:
        return [[(0, count)] for _ in range(count)]
    starts = list(range(0, count - length + 1, stride))
    holding = [[(s, length) for s in starts if s <= t < s + length] for t in range(count)]
    # The frames after the last regular clip are in one more, which ends with the video; frames that were answered
    # before it are not answered again.
    if starts[-1] + length < count:
        first_left = starts[-1] + stride
        for t in range(first_left, count):
            holding[t].append((count - length, length))
    return holding


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 8, 11, 16])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (2, 1), (5, 5), (5, 3), (5, 1), (4, 2), (5, 4)])
def test_every_frame_is_the_mean_of_the_clips_that_hold_it(count, length, stride):
    calls = []

    def segment(frames):
        numbers = [int(frame) for frame in frames]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        calls.append((numbers[0], len(numbers)))
        # An answer by which the clip and the place in it can be told.
        return torch.tensor([[1000.0 * numbers[0] + number] for number in numbers])

    merger = ClipMerger(segment, length, stride)
    answers = []
    for t in range(count):
        answers += merger.push(torch.tensor(t))
        assert len(answers) >= t + 1 - length + 1 - stride  # no frame waits for long
    answers += merger.finish()
    expected = [
        np.mean([1000.0 * start + t for start, _ in clips])
        for t, clips in enumerate(reference(count, length, stride))
    ]
    assert [float(answer) for answer in answers] == pytest.approx(expected)
    assert all(size == min(length, count) for _, size in calls)


def test_memory_does_not_grow_with_the_video():
    merger = ClipMerger(lambda frames: torch.zeros(len(frames), 2), 5, 2)
    for t in range(200):
        merger.push(torch.tensor(t))
        assert len(merger._frames) <= 5 and len(merger._sums) <= 5 and len(merger._answered) <= 4


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (3, 0), (3, 4)])
def test_numbers_out_of_range(length, stride):
    with pytest.raises(UserError, match="give"):
        ClipMerger(lambda frames: torch.zeros(1), length, stride)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = instantiate(apply_overrides(get_config(RUN), SMALL).model)
    torch.nn.init.constant_(model.sem_seg_head.context.gamma, 0.7)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture
def run():
    cfg = apply_overrides(get_config(RUN), SMALL)
    cfg.dataloader.test.mapper.augmentations[0].long_side = 48
    cfg.dataloader.test.mapper.augmentations[0].short_side = 36
    return cfg


@pytest.fixture
def frames():
    return list(np.random.default_rng(0).integers(0, 256, (7, 45, 61, 3), dtype=np.uint8))


def by_hand(predictor, images):
    """Logits (T, K, h, w) of one clip, at the size of the network's input."""
    clip = torch.stack([predictor._inputs(image)["image"] for image in images])
    with torch.no_grad():
        return predictor.model([{"image": clip}])[0]["sem_seg"]


def labels_of(logits, size):
    return torch.nn.functional.interpolate(logits[None], size, mode="bilinear")[0].argmax(0).numpy()


def test_a_video_in_overlapping_clips(run, weights, frames):
    predictor = VideoPredictor(run, weights)
    assert (predictor.clip_length, predictor.clip_stride, predictor.clip_step) == (5, 3, 1)
    found = list(predictor.video(iter(frames)))
    first, last = by_hand(predictor, frames[:5]), by_hand(predictor, frames[2:])
    merged = [*first[:3], (first[3] + last[1]) / 2, (first[4] + last[2]) / 2, *last[3:]]
    assert len(found) == 7
    for prediction, frame, logits in zip(found, frames, merged, strict=True):
        assert np.array_equal(prediction.image, frame)
        assert prediction.labels.shape == (45, 61) and prediction.logits is None
        assert (prediction.labels == labels_of(logits, (45, 61))).mean() > 0.999
        assert prediction.classes.names[3] == "Road"


def test_clips_of_frames_further_apart(run, weights, frames):
    predictor = VideoPredictor(run, weights, clip_length=2, clip_stride=2, clip_step=3)
    found = list(predictor.video(frames))
    clips = {(0, 3): None, (1, 4): None, (2, 5): None, (3, 6): None}
    clips = {pair: by_hand(predictor, [frames[t] for t in pair]) for pair in clips}
    merged = [clips[0, 3][0], clips[1, 4][0], clips[2, 5][0], clips[0, 3][1], clips[1, 4][1], clips[2, 5][1]]
    merged.append(clips[3, 6][1])
    for prediction, frame, logits in zip(found, frames, merged, strict=True):
        assert np.array_equal(prediction.image, frame)
        assert (prediction.labels == labels_of(logits, (45, 61))).mean() > 0.999


def test_the_mode_whole_means_whole_clips(run, weights, frames):
    named = VideoPredictor(run, weights, mode="whole").video(frames[:5])
    default = VideoPredictor(run, weights).video(frames[:5])
    for one, other in zip(named, default, strict=True):
        assert np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_videos_shorter_than_a_clip(run, weights, frames, count):
    predictor = VideoPredictor(run, weights)
    found = list(predictor.video(frames[:count]))
    assert len(found) == count
    if count:
        logits = by_hand(predictor, frames[:count])
        for t in range(count):
            assert (found[t].labels == labels_of(logits[t], (45, 61))).mean() > 0.999


def test_clips_take_the_images_that_single_predictions_take(run, weights, frames):
    predictor = VideoPredictor(run, weights)
    grey = [frame[:, :, 0] for frame in frames[:3]]
    expected = list(predictor.video([frame[:, :, None].repeat(3, axis=2) for frame in grey]))
    for given in (
        grey,
        [np.dstack([frame] * 4) for frame in grey],
        [Image.fromarray(frame) for frame in grey],
    ):
        found = list(predictor.video(given))
        assert len(found) == 3
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.labels, other.labels) and np.array_equal(one.image, other.image)


def test_models_of_single_frames_go_frame_by_frame(make_segmenter, frames):
    model = make_segmenter()
    predictor = VideoPredictor(model, classes=ClassTable.numbered(5))
    read = []

    def reading():
        for t, frame in enumerate(frames):
            read.append(t)
            yield frame

    for t, prediction in enumerate(predictor.video(reading())):
        assert read == list(range(t + 1))  # nothing is read ahead
        assert np.array_equal(prediction.labels, Predictor(model)(frames[t]).labels)
        assert prediction.logits is None
    with pytest.raises(
        UserError, match="a clip length of 5 was given, but TinySegmenter segments single frames"
    ):
        VideoPredictor(model, clip_length=5)


def test_what_clips_cannot_do_is_said(run, weights):
    with pytest.raises(UserError, match="not in the test mode SlidingWindow: leave the mode out"):
        VideoPredictor(run, weights, mode=SlidingWindow(tile=16))
    with pytest.raises(UserError, match="clips of 5 frames cannot start every 6 frames"):
        VideoPredictor(run, weights, clip_stride=6)
    with pytest.raises(UserError, match="give a clip step of at least 1"):
        VideoPredictor(run, weights, clip_step=0)
    model = instantiate(run.model)
    with pytest.raises(UserError, match="how many frames a clip has is not known"):
        VideoPredictor(model)
    assert VideoPredictor(model, clip_length=4).clip_stride == 2
