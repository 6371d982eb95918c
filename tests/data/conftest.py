"""Helpers for data set tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

# The fixtures register on import: here, so that the first test that needs one does not take it away with what it made.
from ccnet_d2.data.datasets import coco_fixture, folder, lip_fixture, register_all  # noqa: F401


@pytest.fixture
def write_pair(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Function that writes images/NAME.EXT and labels/NAME.png under `tmp_path` and returns both paths."""

    def write(
        name: str, label: np.ndarray, image: np.ndarray | None = None, extension: str = "png"
    ) -> tuple[str, str]:
        if image is None:
            image = np.random.default_rng(len(name)).integers(0, 256, (*label.shape, 3), dtype=np.uint8)
        image_path = tmp_path / "images" / f"{name}.{extension}"
        label_path = tmp_path / "labels" / f"{name}.png"
        for path, array in ((image_path, image[:, :, ::-1]), (label_path, label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), array)
        return str(image_path), str(label_path)

    return write


@pytest.fixture(autouse=True)
def _catalogs_as_before() -> Iterator[None]:
    """Remove what a test registered and point the built-in names back at the environment's folder."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
        folder._REGISTERED_HERE.discard(name)
    register_all()
