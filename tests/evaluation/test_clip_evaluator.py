"""Clips are evaluated as their single frames."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from ccnet_d2.data import get_covering_clip_dicts, register_sem_seg_folder
from ccnet_d2.data.datasets import folder
from ccnet_d2.evaluation import ClipSemSegEvaluator

NAME = "clip_evaluator_test"


@pytest.fixture
def frames(tmp_path):
    rng = np.random.default_rng(0)
    for t in range(7):
        for kind, array in (
            ("images", rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)),
            ("labels", rng.choice([0, 1, 2, 255], (8, 9)).astype(np.uint8)),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / f"A_{t}.png")
    register_sem_seg_folder(NAME, tmp_path / "images", tmp_path / "labels", ["a", "b", "c"])
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME, None)
    folder._REGISTERED_HERE.discard(NAME)


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


def test_single_images_pass_through(frames):
    evaluator = ClipSemSegEvaluator(NAME, distributed=False)
    evaluator.reset()
    truth = torch.from_numpy(np.asarray(Image.open(frames[0]["sem_seg_file_name"])).astype(np.int64))
    perfect = torch.nn.functional.one_hot(truth.clamp(max=2), 3).permute(2, 0, 1).float()
    evaluator.process([frames[0]], [{"sem_seg": perfect}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)
