"""Reading clips: one geometry for all frames, loss where it is wanted."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from ccnet_d2.data import ClipMapper, DatasetError, SampleError, SemSegMapper
from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomRotateFit, RandomScaleCrop

FRAMES = 4


def drawn_label(t):
    return np.random.default_rng(t).integers(0, 5, (24, 32), dtype=np.uint8)


@pytest.fixture
def clip(write_pair):
    """A clip whose frames hold their label map as an image: value 20 times the label, plus the frame's number."""
    frames = []
    for t in range(FRAMES):
        label = drawn_label(t)
        image = np.repeat((20 * label + t)[..., None], 3, axis=2)
        path, label_path = write_pair(f"A_{t}", label, image)
        frames.append({"file_name": path, "sem_seg_file_name": label_path, "image_id": f"A_{t}"})
    return {"file_name": frames[0]["file_name"], "frames": frames, "answers": [1]}


def test_an_augmentation_that_fails_names_the_frame_it_is_shown(clip):
    mapper = ClipMapper(True, augmentations=[T.RandomFlip("abc")], loss_frames=[1], num_classes=6)
    name = clip["frames"][1]["file_name"]
    with pytest.raises(DatasetError, match=f"^The image '{name}', .* cannot be augmented by RandomFlip"):
        mapper(clip)


def test_every_frame_gets_the_same_geometry(clip):
    mapper = ClipMapper(
        True,
        augmentations=[
            RandomScaleCrop((16, 20), pad_value=(255, 255, 255)),  # a crop, without interpolation
            T.RandomFlip(horizontal=True),
        ],
        num_classes=5,
    )
    seen = set()
    for seed in range(8):
        np.random.seed(seed)
        mapped = mapper(clip)
        assert mapped["image"].shape == (FRAMES, 3, 16, 20) and mapped["image"].dtype == torch.uint8
        assert mapped["sem_seg"].shape == (FRAMES, 16, 20) and mapped["sem_seg"].dtype == torch.int64
        assert (mapped["height"], mapped["width"]) == (24, 32) and mapped["answers"] == [1]
        for t in range(FRAMES):
            assert torch.equal(mapped["image"][t, 0].long(), 20 * mapped["sem_seg"][t] + t)
            # Where in its file this frame was cut, and whether it was mirrored: found by looking for it.
            source = cv2.imread(clip["frames"][t]["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
            crop = mapped["sem_seg"][t].numpy()
            places = [
                (top, left, flip)
                for top in range(9)
                for left in range(13)
                for flip in (False, True)
                if np.array_equal(source[top : top + 16, left : left + 20], crop[:, ::-1] if flip else crop)
            ]
            assert len(places) == 1
            if t == 0:
                first = places[0]
                seen.add(first)
            assert places[0] == first
    assert len(seen) > 4


def test_colours_are_distorted_alike(clip):
    mapper = ClipMapper(True, augmentations=[RandomPhotometricDistortion(hue_delta=0)], num_classes=5)
    for path in (frame["file_name"] for frame in clip["frames"]):
        cv2.imwrite(path, cv2.imread(clip["frames"][0]["file_name"]))
    np.random.seed(1)
    image = mapper(clip)["image"]
    assert all(torch.equal(image[t], image[0]) for t in range(FRAMES))
    assert not np.array_equal(
        image[0].permute(1, 2, 0).numpy(), cv2.imread(clip["frames"][0]["file_name"])[:, :, ::-1]
    )


@pytest.mark.parametrize("is_train", [True, False])
def test_no_frame_shows_the_ghost_of_another(clip, is_train):
    """Detectron2's RandomSaturation blends with the gray values of the frame it is shown; the others need no pixels."""
    for augmentation in (T.RandomSaturation(0.3, 0.3), T.AugmentationList([T.RandomSaturation(0.3, 0.3)])):
        mapper = ClipMapper(is_train, augmentations=[T.RandomFlip(), augmentation], num_classes=5)
        with pytest.raises(DatasetError, match=r"RandomSaturation .* take .*RandomPhotometricDistortion"):
            mapper(clip)
        # Of a single image the gray values are its own.
        assert mapper(clip["frames"][0])["image"].shape == (3, 24, 32)
    colours = [T.RandomBrightness(0.5, 0.5), T.RandomContrast(0.5, 0.5), T.RandomLighting(0.1)]
    assert ClipMapper(is_train, augmentations=colours, num_classes=5)(clip)["image"].shape[0] == FRAMES


@pytest.mark.parametrize(
    ("loss_frames", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        ("first", [0]),
        ("middle", [2]),
        ("last", [3]),
        ([0, -1], [0, 3]),
        ([1], [1]),
        (0, [0]),
        (-2, [2]),
        ([3, -4], [0, 3]),
    ],
)
def test_loss_is_on_the_frames_asked_for(clip, loss_frames, expected):
    mapped = ClipMapper(True, augmentations=[], num_classes=5, loss_frames=loss_frames)(clip)
    with_loss = [t for t in range(FRAMES) if (mapped["sem_seg"][t] != 255).any()]
    assert with_loss == expected
    assert all((mapped["sem_seg"][t] != 255).all() for t in expected)


def test_frames_without_labels_and_repetitions_carry_no_loss(clip):
    mapper = ClipMapper(True, augmentations=[], num_classes=5)
    del clip["frames"][0]["sem_seg_file_name"]
    clip["frames"][3] = {**clip["frames"][2], "repeated": True}
    mapped = mapper(clip)
    assert torch.equal(mapped["image"][3], mapped["image"][2])
    assert [(mapped["sem_seg"][t] == 255).all().item() for t in range(FRAMES)] == [True, False, False, True]
    # The last frame is a repetition: the last real one carries the loss instead.
    last = ClipMapper(True, augmentations=[], num_classes=5, loss_frames="last")(clip)
    assert [(last["sem_seg"][t] == 255).all().item() for t in range(FRAMES)] == [True, True, False, True]
    with pytest.raises(
        SampleError, match=r"no label map for any frame that carries loss \(loss_frames=\(0,\)\)"
    ):
        ClipMapper(True, augmentations=[], num_classes=5, loss_frames=[0])(clip)


class Looks(T.Augmentation):
    """Notes what an augmentation is shown, and changes nothing."""

    def get_transform(self, image, sem_seg):
        self.image, self.sem_seg = image, sem_seg
        return T.NoOpTransform()


@pytest.mark.parametrize(
    ("loss_frames", "bare", "repeated", "expected", "in_test"),
    [
        ("all", [], [], 0, 0),
        ([-2, -1], [], [], 2, 2),
        ("all", [0, 1], [], 2, 0),  # a video of which some frames have label maps
        ("last", [], [2, 3], 1, 1),  # a sequence shorter than the clip
    ],
)
def test_augmentations_look_at_a_frame_with_a_label_map(clip, loss_frames, bare, repeated, expected, in_test):
    for t in bare:
        del clip["frames"][t]["sem_seg_file_name"]
    for t in repeated:
        clip["frames"][t] = {**clip["frames"][t - 1], "repeated": True}
    looks = Looks()
    ClipMapper(True, augmentations=[looks], num_classes=5, loss_frames=loss_frames)(clip)
    np.testing.assert_array_equal(looks.sem_seg, drawn_label(expected))
    np.testing.assert_array_equal(looks.image[..., 0], 20 * drawn_label(expected) + expected)
    ClipMapper(False, augmentations=[looks], num_classes=5, loss_frames=loss_frames)(clip)
    np.testing.assert_array_equal(looks.image[..., 0], 20 * drawn_label(in_test) + in_test)
    assert looks.sem_seg is None


def test_void_is_what_the_label_files_have_for_it(clip):
    alone = {**clip, "frames": clip["frames"][:1]}
    mapped = ClipMapper(True, augmentations=[], num_classes=4, ignore_label=4)(alone)
    label = drawn_label(0)
    np.testing.assert_array_equal(mapped["sem_seg"].numpy(), [np.where(label == 4, 255, label)])
    assert (mapped["height"], mapped["width"]) == (24, 32)


def test_in_test_there_are_no_labels_and_single_images_are_mapped_too(clip):
    mapper = ClipMapper(False, augmentations=[T.Resize((12, 16))], image_format="BGR")
    coloured = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    cv2.imwrite(clip["frames"][2]["file_name"], coloured)
    mapped = mapper(clip)
    assert mapped["image"].shape == (FRAMES, 3, 12, 16) and "sem_seg" not in mapped
    assert mapped["image"].is_contiguous()
    assert (mapped["height"], mapped["width"]) == (24, 32)
    frame = clip["frames"][2]
    alone = mapper(frame)
    expected = SemSegMapper(False, augmentations=[T.Resize((12, 16))], image_format="BGR")(frame)
    assert torch.equal(alone["image"], expected["image"]) and torch.equal(mapped["image"][2], alone["image"])


def test_what_is_wrong_with_a_frame_is_said(clip, write_pair):
    for index in (4, -5):
        with pytest.raises(DatasetError, match=f"names frame {index}, but clips have 4 frames"):
            ClipMapper(True, augmentations=[], num_classes=5, loss_frames=[1, index])(clip)
    mapper = ClipMapper(True, augmentations=[], num_classes=5)
    small, _ = write_pair("small", np.zeros((10, 32), np.uint8))
    good = clip["frames"][2]
    clip["frames"][2] = {**good, "file_name": small}
    with pytest.raises(
        SampleError, match=r"small\.png' is 32x10, but the first frame of its clip, '.*', is 32x24"
    ):
        mapper(clip)
    clip["frames"][2] = good
    with open(good["file_name"], "r+b") as file:
        file.truncate(60)
    with pytest.raises(SampleError, match=r"A_2\.png' is truncated"):
        mapper(clip)
    with pytest.raises(DatasetError, match="loss_frames is 'some': give one of all, first"):
        ClipMapper(True, augmentations=[], num_classes=5, loss_frames="some")
    with pytest.raises(DatasetError, match="loss_frames is empty"):
        ClipMapper(True, augmentations=[], num_classes=5, loss_frames=[])


def test_classes_that_a_mirror_swaps_are_swapped_in_every_frame(clip):
    plain = ClipMapper(True, augmentations=[], num_classes=5)(clip)["sem_seg"]
    mirrored = ClipMapper(
        True, augmentations=[T.RandomFlip(1.0, horizontal=True)], num_classes=5, flip_pairs=[(1, 3)]
    )(clip)["sem_seg"]
    swapped = torch.tensor([0, 3, 2, 1, 4])[plain]
    assert torch.equal(mirrored, swapped.flip(-1))


@pytest.mark.parametrize(
    "augmentations",
    [
        [RandomRotateFit((20, 36), angle_probability=1.0)],
        [T.RandomRotation([-40, 40]), T.RandomFlip()],
        [T.RandomRotation([-40, 40], expand=False), RandomScaleCrop((26, 22), scale_range=(0.5, 2.0))],
        [T.RandomFlip(), T.RandomExtent((0.5, 1.5), (0.3, 0.3))],
    ],
)
def test_every_frame_is_turned_as_a_single_image_would_be(clip, augmentations):
    options = {"augmentations": augmentations, "num_classes": 5, "flip_pairs": [(1, 3)]}
    voids = []
    for seed in range(4):
        np.random.seed(seed)
        mapped = ClipMapper(True, **options)(clip)
        for t, frame in enumerate(clip["frames"]):
            np.random.seed(seed)
            alone = SemSegMapper(True, **options)(frame)
            assert torch.equal(mapped["image"][t], alone["image"])
            assert torch.equal(mapped["sem_seg"][t], alone["sem_seg"])
        voids.append((mapped["sem_seg"] == 255).float().mean().item())
    assert 0 < max(voids) < 1  # beside the frames


def test_what_augmentations_show_beside_the_frames_is_void(clip):
    mapped = ClipMapper(True, augmentations=[T.FixedSizeCrop((30, 32), pad_value=0.0)], num_classes=5)(clip)
    assert (mapped["sem_seg"][:, 24:] == 255).all() and (mapped["sem_seg"][:, :24] < 5).all()


@pytest.mark.parametrize("kind", [SemSegMapper, ClipMapper])
def test_opencv_has_no_threads_of_its_own_in_workers(clip, kind, monkeypatch):
    """Nor does a mapper take them away from the process that calls it without workers."""
    asked = []
    monkeypatch.setattr(cv2, "setNumThreads", asked.append)
    mapper, sample = kind(False, augmentations=[]), clip if kind is ClipMapper else clip["frames"][0]
    mapper(sample)
    assert not asked
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")
    mapper(sample)
    assert asked == [0]
