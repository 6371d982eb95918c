"""The real CamVid, where $DETECTRON2_DATASETS has it."""

import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from ccnet_d2.data import SemSegMapper, dataset_root, get_sem_seg_dataset_dicts
from ccnet_d2.data.check import check_dataset

pytestmark = pytest.mark.skipif(
    not os.path.isdir(os.path.join(dataset_root(), "camvid", "trainannot")),
    reason="CamVid is not in $DETECTRON2_DATASETS",
)


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_size_and_mapping(split: str, count: int) -> None:
    samples = get_sem_seg_dataset_dicts(f"camvid_sem_seg_{split}")
    assert len(samples) == count
    mapper = SemSegMapper(True, augmentations=[], dataset_names=f"camvid_sem_seg_{split}")
    for sample in samples[:: count // 8]:
        mapped = mapper(sample)
        with Image.open(sample["file_name"]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        # Two JPEG decoders may differ by rounding.
        assert np.abs(mapped["image"].permute(1, 2, 0).numpy().astype(int) - pixels).mean() < 1
        with Image.open(sample["sem_seg_file_name"]) as image:
            label = np.asarray(image).astype(int)
        np.testing.assert_array_equal(mapped["sem_seg"].numpy(), np.where(label == 11, 255, label))


def test_nothing_is_wrong_with_it() -> None:
    report = check_dataset("camvid_sem_seg_val", threads=2)
    assert report.problems == []
    assert report.samples == len(DatasetCatalog.get("camvid_sem_seg_val")) == 101
    assert (report.pixels > 0).all() and report.pixels.sum() + report.void == 101 * 360 * 480
