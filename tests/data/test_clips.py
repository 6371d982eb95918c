"""Which frames make a clip."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccnet_d2.data import (
    DatasetError,
    get_clip_dataset_dicts,
    get_covering_clip_dicts,
    register_sem_seg_folder,
)
from ccnet_d2.data.clips import find_sequences


@pytest.fixture
def frames(tmp_path: Path):
    """Function that registers a set of frames with the given names as "clips_test"."""

    def make(*names: str) -> None:
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
            for name in names:
                Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / folder / f"{name}.png")
        register_sem_seg_folder("clips_test", tmp_path / "images", tmp_path / "labels", ["a", "b"])

    return make


def numbers(clips):
    """Sequence and frame numbers of each clip."""
    found = []
    for clip in clips:
        stems = [Path(frame["file_name"]).stem for frame in clip["frames"]]
        assert len({stem.split("_")[0] for stem in stems}) == 1
        found.append((stems[0].split("_")[0], [int(stem.split("_")[1].lstrip("f")) for stem in stems]))
    return found


def test_training_clips_start_at_every_frame_of_one_sequence(frames):
    # Written so that the order of names is not that of numbers, and with two naming rules.
    frames(*(f"A_{n}" for n in (8, 9, 10, 11, 12)), *(f"B_f{n:05d}" for n in (30, 60, 90)))
    assert numbers(get_clip_dataset_dicts("clips_test", length=3)) == [
        ("A", [8, 9, 10]),
        ("A", [9, 10, 11]),
        ("A", [10, 11, 12]),
        ("B", [30, 60, 90]),
    ]
    found = numbers(get_clip_dataset_dicts("clips_test", length=2, steps=[1, 2], stride=2))
    assert found == [
        ("A", [8, 9]),
        ("A", [10, 11]),
        ("A", [8, 10]),
        ("A", [10, 12]),
        ("B", [30, 60]),
        ("B", [30, 90]),
    ]
    single = get_clip_dataset_dicts("clips_test", length=1)
    assert len(single) == 8 and all(len(clip["frames"]) == 1 for clip in single)
    assert single[0]["file_name"] == single[0]["frames"][0]["file_name"]
    assert [clip["image_id"] for clip in single[:2]] == ["A_8+1", "A_9+1"]
    wide_first = numbers(get_clip_dataset_dicts("clips_test", length=3, steps=[3, 2, 1], stride=9))
    assert wide_first == [("A", [8, 10, 12]), ("A", [8, 9, 10]), ("B", [30, 60, 90])]


def test_a_short_sequence_is_taken_at_its_step_too(frames):
    frames(*[f"A_{t}" for t in range(4)])
    (clip,) = get_clip_dataset_dicts("clips_test", length=3, steps=2)
    assert numbers([clip]) == [("A", [0, 2, 2])]
    assert [frame.get("repeated", False) for frame in clip["frames"]] == [False, False, True]


def test_a_sequence_shorter_than_a_clip_repeats_its_last_frame(frames):
    frames("A_1", "A_2", "A_3", "B_1")
    clips = get_clip_dataset_dicts("clips_test", length=4, steps=[1, 2])
    assert numbers(clips) == [("A", [1, 2, 3, 3]), ("B", [1, 1, 1, 1])]
    assert [[frame.get("repeated", False) for frame in clip["frames"]] for clip in clips] == [
        [False, False, False, True],
        [False, True, True, True],
    ]


def test_gaps_cut_sequences(frames):
    frames(*(f"A_{n}" for n in (0, 30, 60, 1000, 1031, 1061)))
    clips = numbers(get_clip_dataset_dicts("clips_test", length=2, max_gap=31))
    assert clips == [("A", [0, 30]), ("A", [30, 60]), ("A", [1000, 1031]), ("A", [1031, 1061])]
    assert ("A", [60, 1000]) in numbers(get_clip_dataset_dicts("clips_test", length=2))
    in_test = get_covering_clip_dicts(
        "clips_test", length=6, max_gap=31, pattern=r"(?P<sequence>A)_(?P<frame>\d+)"
    )
    assert numbers(in_test) == [("A", [0, 30, 60]), ("A", [1000, 1031, 1061])]
    with pytest.raises(DatasetError, match="does not tell sequence and frame number"):
        get_covering_clip_dicts("clips_test", length=6, pattern=r"(?P<sequence>B)_(?P<frame>\d+)")


def test_folders_are_sequences_of_their_own():
    samples = [{"file_name": f"{folder}/{n}.png"} for folder in ("y", "x") for n in (2, 10, 1)]
    found = [[sample["file_name"] for sample in sequence] for sequence in find_sequences(samples)]
    assert found == [["x/1.png", "x/2.png", "x/10.png"], ["y/1.png", "y/2.png", "y/10.png"]]


@pytest.mark.parametrize("count", [1, 4, 5, 7, 23])
@pytest.mark.parametrize(
    ("length", "step", "stride"), [(1, 1, 1), (5, 1, None), (5, 1, 2), (5, 3, 3), (4, 6, 1)]
)
def test_test_clips_answer_every_frame_once(frames, count, length, step, stride):
    frames(*(f"A_{n:03d}" for n in range(count)), "B_000")
    clips = get_covering_clip_dicts("clips_test", length=length, step=step, stride=stride)
    answered = Counter(clip["frames"][index]["file_name"] for clip in clips for index in clip["answers"])
    assert len(answered) == count + 1 and set(answered.values()) == {1}
    assert all(clip["answers"] for clip in clips)
    for _, frame_numbers in numbers(clips):
        assert len(frame_numbers) <= length
        assert all(b - a == step for a, b in pairwise(frame_numbers))
        if count >= length * step and len(frame_numbers) > 1:
            assert len(frame_numbers) == length


def test_overlapping_test_clips_answer_away_from_their_ends(frames):
    frames(*(f"A_{n}" for n in range(11)))
    clips = get_covering_clip_dicts("clips_test", length=5, stride=3)
    answered = [
        (clip_numbers[0], clip["answers"])
        for clip, (_, clip_numbers) in zip(clips, numbers(clips), strict=True)
    ]
    # Frames 3 and 4 are in the first two clips: 3 is one from the end of the first, 4 one from the start of the second.
    assert answered == [(0, [0, 1, 2, 3]), (3, [1, 2, 3]), (6, [1, 2, 3, 4])]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (get_clip_dataset_dicts, {"length": 0}, "length is 0, but has to be at least 1"),
        (get_clip_dataset_dicts, {"length": 2, "steps": [1, 0]}, r"steps\[1\] is 0"),
        (get_clip_dataset_dicts, {"length": 2, "steps": []}, "steps is empty"),
        (get_clip_dataset_dicts, {"length": 2, "pattern": "x"}, "no groups 'sequence' and 'frame'"),
        (
            get_clip_dataset_dicts,
            {"length": 2, "pattern": r"(?P<sequence>z)(?P<frame>\d)"},
            r"'.*A_1\.png' does not tell sequence and frame number",
        ),
        (
            get_clip_dataset_dicts,
            {"length": 2, "pattern": "("},
            r"pattern '\(' is no regular expression: missing \)",
        ),
        (
            get_clip_dataset_dicts,
            {"length": 2, "pattern": "(?P<frame>[A-Z])_(?P<sequence>.)"},
            r"'.*A_1\.png' does not tell sequence and frame number",
        ),
        (
            get_clip_dataset_dicts,
            {"length": 2, "pattern": "(?P<sequence>.*)(?P<frame>x)?"},
            r"'.*A_1\.png' does not tell sequence and frame number",
        ),
        (get_clip_dataset_dicts, {"length": 2, "max_gap": 0}, "max_gap is 0, but has to be at least 1"),
        (get_covering_clip_dicts, {"length": 2, "max_gap": -1}, "max_gap is -1"),
        (get_clip_dataset_dicts, {"length": 2, "stride": 0}, "stride is 0"),
        (get_covering_clip_dicts, {"length": 0}, "length is 0"),
        (get_covering_clip_dicts, {"length": 2, "step": 0}, "step is 0"),
        (get_covering_clip_dicts, {"length": 2, "stride": 0}, "stride is 0"),
        (get_covering_clip_dicts, {"length": 2, "stride": 3}, "stride=3 is above length=2"),
    ],
)
def test_mistakes_are_named(frames, function, arguments, message):
    frames("A_1", "A_2")
    with pytest.raises(DatasetError, match=message):
        function("clips_test", **arguments)


def test_two_frames_of_one_number_are_an_error(frames):
    frames("A_1", "A_01")
    with pytest.raises(DatasetError, match=r"A_0?1\.png' and '.*' are both frame 1"):
        get_clip_dataset_dicts("clips_test", length=1)
