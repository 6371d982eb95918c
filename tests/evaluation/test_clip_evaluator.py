"""Clips are evaluated as their single frames."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from ccnet_d2.data import (
    ClipMapper,
    DatasetError,
    get_clip_dataset_dicts,
    get_covering_clip_dicts,
    get_sem_seg_dataset_dicts,
    register_sem_seg_folder,
)
from ccnet_d2.evaluation import CheckedSemSegEvaluator, ClipSemSegEvaluator

NAME = "clip_evaluator_test"


@pytest.fixture
def frames(tmp_path, catalogs_as_before):
    rng = np.random.default_rng(0)
    for t in range(7):
        for kind, array in (
            ("images", rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)),
            ("labels", rng.choice([0, 1, 2, 255], (8, 9)).astype(np.uint8)),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / f"A_{t}.png")
    register_sem_seg_folder(NAME, tmp_path / "images", tmp_path / "labels", ["a", "b", "c"])
    return DatasetCatalog.get(NAME)


def test_the_same_metrics_as_frame_by_frame(frames):
    torch.manual_seed(0)
    logits = {frame["file_name"]: torch.randn(3, 8, 9) for frame in frames}
    expected = SemSegEvaluator(NAME, distributed=False)
    expected.reset()
    for frame in frames:
        expected.process([frame], [{"sem_seg": logits[frame["file_name"]]}])

    found = ClipSemSegEvaluator(NAME, distributed=False)
    found.reset()
    clips = get_covering_clip_dicts(NAME, length=3, stride=2)
    for clip in clips:
        answer = torch.stack([logits[frame["file_name"]] for frame in clip["frames"]])
        left_out = [t for t in range(3) if t not in clip["answers"]]
        answer[left_out] = 100 * torch.randn_like(answer[left_out])  # must not count
        found.process([clip], [{"sem_seg": answer}])
    results, theirs = (evaluator.evaluate()["sem_seg"] for evaluator in (found, expected))
    assert results == pytest.approx({key: theirs[key] for key in results})


def test_clips_that_do_not_say_what_they_answer_answer_every_frame(frames):
    evaluator = ClipSemSegEvaluator(NAME, distributed=False)
    evaluator.process([{"frames": frames[2:5]}], [{"sem_seg": torch.randn(3, 3, 8, 9)}])
    labels = [np.asarray(Image.open(frame["sem_seg_file_name"])) for frame in frames[2:5]]
    assert evaluator.confusion.sum() == np.count_nonzero(np.stack(labels) != 255)


def test_single_images_pass_through(frames):
    evaluator = ClipSemSegEvaluator(NAME, distributed=False)
    evaluator.reset()
    truth = torch.from_numpy(np.asarray(Image.open(frames[0]["sem_seg_file_name"])).astype(np.int64))
    perfect = torch.nn.functional.one_hot(truth.clamp(max=2), 3).permute(2, 0, 1).float()
    evaluator.process([frames[0]], [{"sem_seg": perfect}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


@pytest.mark.parametrize("how", ["left out", "None"])
def test_frames_without_label_maps_are_shown_to_the_network_and_not_counted(frames, how):
    """As in a video of which every n-th frame is labelled: from the records to the metrics."""
    for t, frame in enumerate(frames):
        if t not in (2, 6):
            frame["sem_seg_file_name"] = None
            if how == "left out":
                del frame["sem_seg_file_name"]
    DatasetCatalog.pop(NAME)
    DatasetCatalog.register(NAME, lambda: frames)
    train = ClipMapper(True, augmentations=[], dataset_names=NAME)
    mapped = train(get_clip_dataset_dicts(NAME, length=3)[0])
    assert mapped["image"].shape[0] == 3
    assert [(label != 255).any().item() for label in mapped["sem_seg"]] == [False, False, True]

    torch.manual_seed(0)
    evaluator = ClipSemSegEvaluator(NAME, distributed=False)
    confusion = np.zeros((3, 3), int)
    clips = get_covering_clip_dicts(NAME, length=3)
    assert sum(len(clip["answers"]) for clip in clips) == len(frames)
    for clip in clips:
        answer = torch.randn(len(clip["frames"]), 3, 8, 9)
        evaluator.process([clip], [{"sem_seg": answer}])
        for index in clip["answers"]:
            if (path := clip["frames"][index].get("sem_seg_file_name")) is not None:
                label = np.asarray(Image.open(path))
                for row, column in np.argwhere(label != 255):
                    confusion[label[row, column], answer[index, :, row, column].argmax()] += 1
    np.testing.assert_array_equal(evaluator.confusion, confusion)
    assert confusion.sum() > 0
    # Without any label map there is nothing to train on or to compare with; single images all need one.
    for takes_them_all in (get_sem_seg_dataset_dicts, CheckedSemSegEvaluator):
        with pytest.raises(DatasetError, match=r"has no label map for .*A_0\.png"):
            takes_them_all(NAME)
    for frame in frames:
        frame.pop("sem_seg_file_name", None)
    with pytest.raises(DatasetError, match=r"has no label map for .*A_0\.png"):
        get_clip_dataset_dicts(NAME, length=3)
