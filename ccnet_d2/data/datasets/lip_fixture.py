"""A small drawn data set in LIP's layout: persons seen from the front, with every class of LIP.

It exists to be learned within minutes on a CPU, and to try everything that LIP needs without LIP. A class can be told
by colour and place, left from right by place alone: the left arm is on the right in the picture and looks like the
other one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ccnet_d2.data.datasets.drawn_set import drawn_set_folder, read_manifest, write_drawn_set
from ccnet_d2.data.datasets.lip import LIP_CLASSES, register_lip
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.data.image_files import write_bgr

__all__ = ["NAME", "LipFixtureConfig", "draw_person", "generate_lip_fixture", "register_lip_fixture"]

NAME = "ccnet_lip_fixture"
LAYOUTS = ("ce2p", "official")
_MANIFEST = "lip_fixture.json"
_GENERATOR = "ccnet_d2 LIP fixture"
_FORMAT = 1  # of the drawings; a set drawn in another one is drawn again
_SPLITS = ("train", "val")
_OUTFITS = ("trousers", "dress", "coat", "jumpsuit", "skirt")
_SUBPIXEL_BITS = 4

# RGB. Both arms, both legs and both shoes look alike.
_SKIN, _SHOE = (224, 178, 140), (70, 45, 30)
_COLORS = {
    "Hat": (150, 30, 40),
    "Hair": (60, 40, 20),
    "Glove": (20, 110, 60),
    "Sunglasses": (15, 15, 20),
    "Upper-clothes": (230, 110, 40),
    "Dress": (190, 60, 160),
    "Coat": (40, 120, 200),
    "Socks": (240, 240, 240),
    "Pants": (40, 60, 110),
    "Jumpsuits": (110, 130, 60),
    "Scarf": (240, 210, 60),
    "Skirt": (120, 30, 90),
    "Face": (250, 200, 180),
    "Left-arm": _SKIN,
    "Right-arm": _SKIN,
    "Left-leg": _SKIN,
    "Right-leg": _SKIN,
    "Left-shoe": _SHOE,
    "Right-shoe": _SHOE,
}
_LABEL = {name: label for label, name in enumerate(LIP_CLASSES)}


@dataclass(frozen=True)
class LipFixtureConfig:
    """Everything the data set depends on.

    Attributes:
        train_images, val_images: number of images; from 12 on, each class occurs.
        size: longer side of the images in pixels; they vary by a fifth.
        layout: "ce2p" or "official", see `register_lip`.
        noise: standard deviation of the Gaussian noise on every pixel and channel, in grey levels of 0..255.
        seed: any non-negative integer.
    """

    train_images: int = 40
    val_images: int = 12
    size: int = 128
    layout: str = "ce2p"
    noise: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, least in (("train_images", 1), ("val_images", 1), ("size", 48), ("seed", 0)):
            if getattr(self, key) < least:
                raise DatasetError(
                    f"LIP fixture: {key} is {getattr(self, key)}, but at least {least} is needed."
                )
        if self.layout not in LAYOUTS:
            raise DatasetError(f"LIP fixture: layout is '{self.layout}', but one of {LAYOUTS} is needed.")


class _Canvas:
    """Draws the classes' shapes into a label map, given in heights of the person from the top of the head."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.labels = np.zeros((height, width), np.uint8)
        self._scale = height * rng.uniform(0.84, 0.93)
        self._origin = np.array([width / 2 + rng.uniform(-0.04, 0.04) * width, 0.04 * height])
        angle = rng.uniform(-0.06, 0.06)  # of the whole person, in radians
        self._rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def _pixels(self, points: Sequence[Sequence[float]]) -> np.ndarray:
        at = (np.asarray(points, float) - [0, 0.5]) @ self._rotation.T + [0, 0.5]
        at = at * self._scale + self._origin
        return np.rint((at - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)

    def polygon(self, name: str, points: Sequence[Sequence[float]]) -> None:
        cv2.fillPoly(self.labels, [self._pixels(points)], _LABEL[name], shift=_SUBPIXEL_BITS)

    def ellipse(self, name: str, x: float, y: float, half_width: float, half_height: float) -> None:
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        self.polygon(
            name, np.stack([x + half_width * np.cos(angle), y + half_height * np.sin(angle)], axis=1)
        )

    def limb(self, name: str, start: Sequence[float], end: Sequence[float], half_width: float) -> None:
        start, end = np.asarray(start, float), np.asarray(end, float)
        along = (end - start) / np.linalg.norm(end - start)
        side = half_width * np.array([-along[1], along[0]])
        self.polygon(name, [start + side, end + side, end - side, start - side])


def draw_person(index: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """The label map of one person from the front, (height, width) uint8.

    Args:
        index: chooses clothes and accessories; twelve in a row show every class.
        height, width: of the picture in pixels.
        rng: draws size, pose and place.
    """
    canvas = _Canvas(height, width, rng)
    outfit = _OUTFITS[index % len(_OUTFITS)]
    stance, lift = rng.uniform(0.05, 0.09), rng.uniform(0.1, 0.9, 2)
    # In the picture the person's left is on the right.
    sides = (("Left", 1.0, lift[0]), ("Right", -1.0, lift[1]))
    for side, sign, _ in sides:
        hip, foot = np.array([sign * 0.05, 0.50]), np.array([sign * stance, 0.93])
        canvas.limb(f"{side}-leg", hip, foot, 0.032)
        if index % 3 != 2:
            canvas.limb("Socks", hip + 0.8 * (foot - hip), foot, 0.033)
        canvas.ellipse(f"{side}-shoe", foot[0] + 0.02 * sign, 0.95, 0.055, 0.028)
        if outfit in ("trousers", "coat", "jumpsuit"):
            garment = "Jumpsuits" if outfit == "jumpsuit" else "Pants"
            canvas.limb(garment, hip - [0, 0.04], hip + 0.72 * (foot - hip), 0.048)
    if outfit == "skirt":
        canvas.polygon("Skirt", [(-0.09, 0.46), (0.09, 0.46), (0.15, 0.68), (-0.15, 0.68)])
    if outfit == "dress":
        half = [(0.12, 0.19), (0.09, 0.42), (0.17, 0.72)]
        canvas.polygon("Dress", [*half, *((-x, y) for x, y in reversed(half))])
    else:
        torso = [(-0.12, 0.19), (0.12, 0.19), (0.10, 0.51), (-0.10, 0.51)]
        canvas.polygon("Jumpsuits" if outfit == "jumpsuit" else "Upper-clothes", torso)
    if outfit == "coat":
        for sign in (-1.0, 1.0):
            canvas.polygon(
                "Coat", [(sign * 0.03, 0.19), (sign * 0.14, 0.19), (sign * 0.15, 0.66), (sign * 0.04, 0.66)]
            )
    for side, sign, raised in sides:
        shoulder = np.array([sign * 0.12, 0.215])
        hand = shoulder + 0.30 * np.array([sign * np.sin(raised), np.cos(raised)])
        canvas.limb(f"{side}-arm", shoulder, hand, 0.028)
        if index % 3 == 1:
            canvas.ellipse("Glove", *hand, 0.036, 0.036)
    canvas.ellipse("Hair", 0, 0.085, 0.075, 0.088)
    canvas.ellipse("Face", 0, 0.105, 0.053, 0.068)
    if index % 3 == 0:
        canvas.polygon("Sunglasses", [(-0.05, 0.085), (0.05, 0.085), (0.05, 0.11), (-0.05, 0.11)])
    if index % 4 in (1, 2):
        canvas.polygon("Scarf", [(-0.07, 0.165), (0.07, 0.165), (0.06, 0.215), (-0.06, 0.215)])
    if index % 2 == 0:
        half = [(0.06, -0.01), (0.07, 0.035), (0.11, 0.06)]
        canvas.polygon("Hat", [*half, *((-x, y) for x, y in reversed(half))])
    return canvas.labels


def _paint(labels: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The picture of a label map, (H, W, 3) uint8 BGR: the classes' colours, shifted, before a grey-green slope."""
    height, width = labels.shape
    ends = rng.uniform(90, 170, (2, 1, 1, 3)) * [0.85, 1.0, 0.9]
    slope = np.linspace(0, 1, height)[:, None, None]
    image = np.broadcast_to(ends[0] * (1 - slope) + ends[1] * slope, (height, width, 3)).copy()
    shifts: dict[tuple[int, ...], np.ndarray] = {}
    for name, color in _COLORS.items():
        shift = shifts.setdefault(color, rng.uniform(-14, 14, 3))  # both arms the same
        image[labels == _LABEL[name]] = np.add(color, shift)
    image += noise * rng.standard_normal(image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)[:, :, ::-1]


def generate_lip_fixture(
    root: str | os.PathLike[str] | None = None, config: LipFixtureConfig | None = None
) -> bool:
    """Write the data set, or leave it alone if this one is already there.

    It is written beside `root` and moved there whole, so that `root` is never half a data set.

    Args:
        root: folder to write; default: ``ccnet_lip_fixture`` in :func:`dataset_root`. With ``LIP`` in there it takes
            LIP's place for the configs of `configs/lip`.
        config: what to draw; default: :class:`LipFixtureConfig` as it stands.

    Returns:
        Whether files were written.

    Raises:
        DatasetError: `root` holds something else, such as LIP itself, or cannot be written.
    """
    config = config or LipFixtureConfig()
    root = drawn_set_folder(root, NAME)
    return write_drawn_set(
        root,
        "LIP fixture",
        lambda new: _write_set(new, config),
        is_there=lambda: _read_manifest(root) == _manifest(config) and _is_complete(root, config),
        is_ours=lambda: _read_manifest(root) is not None,
    )


def register_lip_fixture(root: str | os.PathLike[str] | None = None) -> None:
    """Register ``ccnet_lip_fixture_{train,val}``; calling it again moves the registration. No file is read yet.

    Args:
        root: folder of the data set; default: ``ccnet_lip_fixture`` in :func:`dataset_root`.
    """
    root = drawn_set_folder(root, NAME)
    register_lip(
        root,
        prefix=NAME,
        hint=f"draw the fixture, in a second, with `python projects/CCNet/tools/make_lip_fixture.py --root {root}`.",
    )


def _names(config: LipFixtureConfig, split: str) -> list[str]:
    """Of a split's images, as LIP's are."""
    first = 100000 * (_SPLITS.index(split) + 1)
    return [f"{first + index}_{400000 + index}" for index in range(getattr(config, f"{split}_images"))]


def _folders(root: str | os.PathLike[str], config: LipFixtureConfig, split: str) -> tuple[str, str]:
    """Those of a split's images and label maps."""
    labels_root = os.path.join(root, "TrainVal_parsing_annotations" if config.layout == "official" else "")
    return os.path.join(root, f"{split}_images"), os.path.join(labels_root, f"{split}_segmentations")


def _list_file(root: str | os.PathLike[str], split: str) -> str:
    return os.path.join(root, f"{split}_id.txt")


def _is_complete(root: str, config: LipFixtureConfig) -> bool:
    """Whether every file the set consists of is there."""
    files = [_list_file(root, split) for split in _SPLITS] if config.layout == "ce2p" else []
    for split in _SPLITS:
        images, labels = _folders(root, config, split)
        for name in _names(config, split):
            files += [os.path.join(images, f"{name}.jpg"), os.path.join(labels, f"{name}.png")]
    return all(map(os.path.isfile, files))


def _write_set(root: Path, config: LipFixtureConfig) -> None:
    for number, split in enumerate(_SPLITS):
        images, labels = _folders(root, config, split)
        os.makedirs(images)
        os.makedirs(labels)
        names = _names(config, split)
        for index, name in enumerate(names):
            rng = np.random.default_rng([config.seed, number, index])
            height = round(config.size * rng.uniform(0.8, 1.0))
            person = draw_person(index, height, round(height * rng.uniform(0.48, 0.66)), rng)
            write_bgr(os.path.join(images, f"{name}.jpg"), _paint(person, config.noise, rng))
            write_bgr(os.path.join(labels, f"{name}.png"), person)
        if config.layout == "ce2p":
            with open(_list_file(root, split), "w", encoding="utf-8") as stream:
                stream.writelines(f"{name}\n" for name in names)
    with open(os.path.join(root, _MANIFEST), "w", encoding="utf-8") as stream:
        json.dump(_manifest(config), stream, indent=2)
        stream.write("\n")


def _manifest(config: LipFixtureConfig) -> dict[str, Any]:
    return {"generator": _GENERATOR, "format": _FORMAT, "config": asdict(config)}


def _read_manifest(root: str) -> dict[str, Any] | None:
    return read_manifest(os.path.join(root, _MANIFEST), _GENERATOR)


register_lip_fixture()
