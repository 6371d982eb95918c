"""The scenes of the synthetic data set, where context decides: an object's class hangs on a cue somewhere else.

Each image is noise with a few squares (the objects) and one small cue, whose colour is one of k. By default
all objects look alike and the cue's colour is their class; with c > 1 object colours the class is ``(the
object's colour + the cue's colour) mod k``, for k = c = 2 the exclusive or, which takes longer to learn.
Either way an object's look says nothing about its class, and as the cue lies anywhere in the image, a
network that sees a neighbourhood can do no better than chance on the objects. With one criss-cross step an
object learns the cue's colour only if it shares rows or columns with it; with two steps, always. It is the
argument of CCNet (Fig. 1 and Sec. 3.3 of the paper) as something that trains in minutes on a CPU.

Classes: 0 background, 1 cue, 2 … k + 1 the object classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccnet_d2.data.errors import DatasetError

__all__ = [
    "BACKGROUND",
    "CUE",
    "FIRST_OBJECT_CLASS",
    "SPLITS",
    "Scene",
    "Square",
    "SyntheticConfig",
    "class_colors",
    "class_names",
    "draw_scene",
    "label_scene",
    "render_scene",
    "sample_rng",
    "shares_line",
]

SPLITS = ("train", "val")
BACKGROUND, CUE, FIRST_OBJECT_CLASS = 0, 1, 2

# RGB in 0..255, far from one another and from the grey of the background.
_OBJECT_COLORS = ((60, 190, 60), (215, 195, 50), (60, 200, 200), (235, 235, 235))
_CUE_COLORS = ((220, 40, 40), (50, 70, 225), (205, 60, 205), (20, 20, 20))
_CLASS_COLORS = ((40, 40, 40), (220, 40, 40), (70, 160, 220), (240, 160, 40), (120, 90, 200), (110, 180, 90))

_PLACEMENT_TRIES = 200


@dataclass(frozen=True)
class SyntheticConfig:
    """Everything the data set depends on; equal configs give equal files.

    Attributes:
        train_images, val_images: number of images.
        height, width: image size in pixels.
        num_objects: objects in each image.
        min_object_size, max_object_size: side of the square objects in pixels, both included.
        cue_size: side of the square cue in pixels.
        num_kinds: k, number of cue colours and of object classes (2 to 4).
        object_colors: c, number of colours that objects have (1 to k); see above.
        max_on_cross: largest number of objects of an image that may share a row or a column with the cue;
            `None` places the cue anywhere.
        noise: standard deviation of the Gaussian noise on every pixel and channel, in grey levels of 0..255.
        seed: any non-negative integer.
    """

    train_images: int = 2000
    val_images: int = 200
    height: int = 48
    width: int = 48
    num_objects: int = 5
    min_object_size: int = 6
    max_object_size: int = 8
    cue_size: int = 4
    num_kinds: int = 2
    object_colors: int = 1
    max_on_cross: int | None = None
    noise: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(good: bool, key: str, rule: str) -> None:
            if not good:
                raise DatasetError(f"Synthetic data set: {key} is {getattr(self, key)}, {rule}.")

        for key in ("train_images", "val_images", "num_objects", "min_object_size", "cue_size"):
            check(getattr(self, key) >= 1, key, "but at least 1 is needed")
        check(self.max_object_size >= self.min_object_size, "max_object_size", "less than min_object_size")
        largest = max(self.max_object_size, self.cue_size)
        for key in ("height", "width"):
            check(getattr(self, key) >= largest, key, f"but a square of {largest} pixels has to fit")
        check(2 <= self.num_kinds <= len(_OBJECT_COLORS), "num_kinds", f"outside 2 to {len(_OBJECT_COLORS)}")
        check(1 <= self.object_colors <= self.num_kinds, "object_colors", "outside 1 to num_kinds")
        check(self.max_on_cross is None or self.max_on_cross >= 0, "max_on_cross", "but at least 0 is needed")
        check(0 <= self.noise <= 255, "noise", "outside 0 to 255")
        check(self.seed >= 0, "seed", "but at least 0 is needed")

    @property
    def num_classes(self) -> int:
        """K: background, cue and the object classes."""
        return FIRST_OBJECT_CLASS + self.num_kinds


@dataclass(frozen=True)
class Square:
    """A square of one colour: top left pixel, side (pixels) and index of its colour, 0 to k - 1."""

    top: int
    left: int
    size: int
    color: int

    def touches(self, other: Square) -> bool:
        """Whether the two squares overlap or lie side by side."""
        return (
            self.top <= other.top + other.size
            and other.top <= self.top + self.size
            and self.left <= other.left + other.size
            and other.left <= self.left + self.size
        )


@dataclass(frozen=True)
class Scene:
    """What one image shows."""

    cue: Square
    objects: tuple[Square, ...]


def class_names(num_kinds: int = 2) -> list[str]:
    """The K class names."""
    return ["background", "cue", *(f"object {'ABCD'[i]}" for i in range(num_kinds))]


def class_colors(num_kinds: int = 2) -> list[tuple[int, int, int]]:
    """K RGB colours for pictures of labels and predictions."""
    return list(_CLASS_COLORS[: FIRST_OBJECT_CLASS + num_kinds])


def sample_rng(config: SyntheticConfig, split: str, index: int) -> np.random.Generator:
    """Random numbers of one image, independent of how many images there are."""
    return np.random.default_rng([config.seed, SPLITS.index(split), index])


def shares_line(square: Square, cue: Square) -> bool:
    """Whether some pixel of `square` has the row or the column of some pixel of `cue`."""
    rows = square.top < cue.top + cue.size and cue.top < square.top + square.size
    columns = square.left < cue.left + cue.size and cue.left < square.left + square.size
    return rows or columns


def _place(config: SyntheticConfig, size: int, colors: int, rng: np.random.Generator) -> Square:
    top = int(rng.integers(0, config.height - size + 1))
    left = int(rng.integers(0, config.width - size + 1))
    return Square(top, left, size, int(rng.integers(0, colors)))


def draw_scene(config: SyntheticConfig, rng: np.random.Generator) -> Scene:
    """Draw positions, sizes and colours: uniform, squares apart from one another by a pixel at least.

    Raises:
        DatasetError: the objects do not fit into the image.
    """
    for _ in range(_PLACEMENT_TRIES):
        squares = [_place(config, config.cue_size, config.num_kinds, rng)]
        for _ in range(config.num_objects):
            size = int(rng.integers(config.min_object_size, config.max_object_size + 1))
            for _ in range(_PLACEMENT_TRIES):
                square = _place(config, size, config.object_colors, rng)
                if not any(square.touches(other) for other in squares):
                    squares.append(square)
                    break
            else:
                break
        if len(squares) <= config.num_objects:
            continue
        scene = Scene(squares[0], tuple(squares[1:]))
        on_cross = sum(shares_line(square, scene.cue) for square in scene.objects)
        if config.max_on_cross is None or on_cross <= config.max_on_cross:
            return scene
    raise DatasetError(
        f"Synthetic data set: no room for {config.num_objects} objects of {config.min_object_size} to "
        f"{config.max_object_size} pixels in {config.width}x{config.height} under these rules; "
        "take fewer or smaller ones, or a larger image."
    )


def _fill(canvas: np.ndarray, square: Square, value: Any) -> None:
    canvas[square.top : square.top + square.size, square.left : square.left + square.size] = value


def label_scene(config: SyntheticConfig, scene: Scene) -> np.ndarray:
    """Label map of a scene, (H, W) uint8 with values below K."""
    label = np.full((config.height, config.width), BACKGROUND, dtype=np.uint8)
    _fill(label, scene.cue, CUE)
    for square in scene.objects:
        _fill(label, square, FIRST_OBJECT_CLASS + (square.color + scene.cue.color) % config.num_kinds)
    return label


def render_scene(config: SyntheticConfig, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Image of a scene, (H, W, 3) uint8 RGB."""
    image = np.full((config.height, config.width, 3), 128.0)
    _fill(image, scene.cue, _CUE_COLORS[scene.cue.color])
    for square in scene.objects:
        _fill(image, square, _OBJECT_COLORS[square.color])
    image += config.noise * rng.standard_normal(image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
