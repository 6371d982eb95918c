"""A small drawn data set in COCO's format: a few images of squares, discs and triangles, with polygons.

It exists to be learned by heart: a detector that cannot reach a high AP on the images it was trained on is broken.
Colour says nothing about the class, shape does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ccnet_d2.data.datasets.drawn_set import drawn_set_folder, write_drawn_set
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.data.image_files import write_bgr

__all__ = ["CLASSES", "NAME", "CocoFixtureConfig", "generate_coco_fixture", "register_coco_fixture"]

NAME = "ccnet_coco_fixture"
CLASSES = ("square", "disc", "triangle")
_ANNOTATIONS = "annotations.json"
_GENERATOR = "ccnet_d2 coco fixture"
_PLACEMENT_TRIES = 500


@dataclass(frozen=True)
class CocoFixtureConfig:
    """Everything the data set depends on.

    Attributes:
        images: number of images.
        size: side of the square images in pixels.
        max_objects: largest number of objects in an image; every image has one at least.
        min_object_size, max_object_size: side of an object's bounding box in pixels.
        noise: standard deviation of the Gaussian noise on every pixel and channel, in grey levels of 0..255.
        seed: any non-negative integer.
    """

    images: int = 8
    size: int = 128
    max_objects: int = 3
    min_object_size: int = 24
    max_object_size: int = 52
    noise: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("images", "max_objects", "min_object_size"):
            if getattr(self, key) < 1:
                raise DatasetError(f"COCO fixture: {key} is {getattr(self, key)}, but at least 1 is needed.")
        if not self.min_object_size <= self.max_object_size <= self.size:
            raise DatasetError(
                f"COCO fixture: min_object_size={self.min_object_size}, max_object_size={self.max_object_size} and "
                f"size={self.size} must not fall."
            )
        if self.seed < 0:
            raise DatasetError(f"COCO fixture: seed is {self.seed}, but at least 0 is needed.")


def generate_coco_fixture(
    root: str | os.PathLike[str] | None = None, config: CocoFixtureConfig | None = None
) -> bool:
    """Write the data set, or leave it alone if this one is already there.

    Files: ``images/NAME.png`` and ``annotations.json``. They are written beside `root` and moved there whole.

    Args:
        root: folder to write; default: ``ccnet_coco_fixture`` in :func:`dataset_root`.
        config: what to draw; default: :class:`CocoFixtureConfig` as it stands.

    Returns:
        Whether files were written.

    Raises:
        DatasetError: `root` holds something else or cannot be written, or the objects do not fit.
    """
    config = config or CocoFixtureConfig()
    root = drawn_set_folder(root, NAME)
    info = {"generator": _GENERATOR, "config": asdict(config)}
    return write_drawn_set(
        root,
        "COCO fixture",
        lambda new: _write_set(new, config, info),
        is_there=lambda: _read_info(root) == info and _has_all_images(root, config),
        is_ours=lambda: _read_info(root).get("generator") == _GENERATOR,
    )


def _file_name(index: int) -> str:
    return f"{index:04d}.png"


def _has_all_images(root: str, config: CocoFixtureConfig) -> bool:
    return all(os.path.isfile(os.path.join(root, "images", _file_name(i))) for i in range(config.images))


def _write_set(root: Path, config: CocoFixtureConfig, info: dict[str, Any]) -> None:
    data: dict[str, Any] = {
        "info": info,
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    (root / "images").mkdir()
    for index in range(config.images):
        image, objects = _draw(config, np.random.default_rng([config.seed, index]))
        file_name = _file_name(index)
        write_bgr(root / "images" / file_name, image)
        record = {"id": index + 1, "file_name": file_name, "height": config.size, "width": config.size}
        data["images"].append(record)
        for category, polygon in objects:
            data["annotations"].append(
                _annotation(len(data["annotations"]) + 1, index + 1, category, polygon)
            )
    with (root / _ANNOTATIONS).open("w", encoding="utf-8") as stream:
        json.dump(data, stream)


def register_coco_fixture(root: str | os.PathLike[str] | None = None, name: str = NAME) -> None:
    """Register the data set under `name`; calling it again moves the registration. No file is read yet.

    Args:
        root: folder of the data set; default: ``ccnet_coco_fixture`` in :func:`dataset_root`.
        name: of the data set in Detectron2's catalogs.
    """
    root = drawn_set_folder(root, NAME)
    if name in DatasetCatalog:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    DatasetCatalog.register(name, partial(_load, root, name))
    MetadataCatalog.get(name).set(
        json_file=os.path.join(root, _ANNOTATIONS),
        image_root=os.path.join(root, "images"),
        evaluator_type="coco",
        thing_classes=list(CLASSES),
    )


def _load(root: str, name: str) -> list[dict[str, Any]]:
    annotations = os.path.join(root, _ANNOTATIONS)
    if not os.path.isfile(annotations):
        raise DatasetError(
            f"There is no COCO fixture in '{root}'; draw it, in a second, with "
            f"`python projects/CCNet/tools/make_coco_fixture.py --root {root}`."
        )
    return load_coco_json(annotations, os.path.join(root, "images"), name)


def _read_info(root: str) -> dict[str, Any]:
    """What the annotations under `root` say of themselves, nothing if there are none that can be read."""
    try:
        with open(os.path.join(root, _ANNOTATIONS), encoding="utf-8") as stream:
            info = json.load(stream)["info"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return {}
    return info if isinstance(info, dict) else {}


def _draw(
    config: CocoFixtureConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image, (H, W, 3) uint8 BGR, and its objects as (category id, polygon (P, 2) of x and y)."""
    image = np.full((config.size, config.size, 3), rng.integers(90, 140), np.uint8)
    boxes: list[tuple[int, int, int]] = []
    objects = []
    for _ in range(int(rng.integers(1, config.max_objects + 1))):
        category = int(rng.integers(1, len(CLASSES) + 1))
        box = _place(config, boxes, rng)
        if box is None:
            break
        boxes.append(box)
        polygon = _polygon(CLASSES[category - 1], *box)
        # Far from the grey of the background in one direction or the other.
        color = rng.choice([25, 230], size=3) + rng.integers(-20, 21, size=3)
        cv2.fillPoly(image, [np.rint(polygon).astype(np.int32)], [int(c) for c in color])
        objects.append((category, polygon))
    noisy = image + config.noise * rng.standard_normal(image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), objects


def _place(
    config: CocoFixtureConfig, boxes: Sequence[tuple[int, int, int]], rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """Left, top and side of a box that touches none of `boxes`; None if no room was found."""
    for _ in range(_PLACEMENT_TRIES):
        side = int(rng.integers(config.min_object_size, config.max_object_size + 1))
        left, top = (int(v) for v in rng.integers(0, config.size - side + 1, size=2))
        if all(left > x + s or x > left + side or top > y + s or y > top + side for x, y, s in boxes):
            return left, top, side
    return None


def _polygon(shape: str, left: int, top: int, side: int) -> np.ndarray:
    """Corners (P, 2) of the shape that fills a box."""
    last = side - 1
    if shape == "square":
        corners = np.array([[0, 0], [last, 0], [last, last], [0, last]], float)
    elif shape == "triangle":
        corners = np.array([[last / 2, 0], [last, last], [0, last]], float)
    else:
        angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        corners = last / 2 * (1 + np.stack([np.cos(angle), np.sin(angle)], axis=1))
    return corners + np.array([left, top])


def _annotation(number: int, image: int, category: int, polygon: np.ndarray) -> dict[str, Any]:
    x, y = polygon.T
    left, top = float(x.min()), float(y.min())
    area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, float(x.max()) - left, float(y.max()) - top],
        "area": area,
        "segmentation": [[round(float(v), 2) for v in polygon.reshape(-1)]],
        "iscrowd": 0,
    }


register_coco_fixture()
