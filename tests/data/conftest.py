"""Helpers for data set tests."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest


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
def _own_catalogs(catalogs_as_before: None) -> None:
    """Here every test registers."""
