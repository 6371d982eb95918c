"""A synthetic data set on which context decides: the class of every object hangs on a cue somewhere else.

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

import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import cv2
import numpy as np

from ccnet_d2.data.datasets.folder import list_pairs, register
from ccnet_d2.data.errors import DatasetError

__all__ = [
    "BACKGROUND",
    "CUE",
    "FIRST_OBJECT_CLASS",
    "Scene",
    "Square",
    "SyntheticConfig",
    "class_colors",
    "class_names",
    "draw_scene",
    "generate_synthetic_dataset",
    "label_scene",
    "read_manifest",
    "register_synthetic",
    "render_scene",
    "sample_rng",
    "shares_line",
]

BACKGROUND, CUE, FIRST_OBJECT_CLASS = 0, 1, 2

# RGB in 0..255, far from one another and from the grey of the background.
_OBJECT_COLORS = ((60, 190, 60), (215, 195, 50), (60, 200, 200), (235, 235, 235))
_CUE_COLORS = ((220, 40, 40), (50, 70, 225), (205, 60, 205), (20, 20, 20))
_CLASS_COLORS = ((40, 40, 40), (220, 40, 40), (70, 160, 220), (240, 160, 40), (120, 90, 200), (110, 180, 90))

_FORMAT = 2  # of the files; a set written in another one is made again
_MANIFEST = "manifest.json"
_SPLITS = ("train", "val")
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
    return np.random.default_rng([config.seed, _SPLITS.index(split), index])


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


def _images(config: SyntheticConfig, split: str) -> Iterator[tuple[str, Scene, np.ndarray]]:
    for index in range(getattr(config, f"{split}_images")):
        rng = sample_rng(config, split, index)
        scene = draw_scene(config, rng)
        yield f"{split}_{index:05d}", scene, render_scene(config, scene, rng)


def _write_png(path: str, image: np.ndarray) -> None:
    if not cv2.imwrite(path, image):
        raise OSError(f"Cannot write '{path}'.")


def _write_set(root: str, config: SyntheticConfig) -> None:
    objects = on_cross = 0
    for split in _SPLITS:
        for kind in ("images", "labels"):
            os.makedirs(os.path.join(root, kind, split))
        scenes: dict[str, Any] = {}
        for name, scene, image in _images(config, split):
            _write_png(os.path.join(root, "images", split, f"{name}.png"), image[:, :, ::-1])
            _write_png(os.path.join(root, "labels", split, f"{name}.png"), label_scene(config, scene))
            scenes[name] = asdict(scene)
            objects += len(scene.objects)
            on_cross += sum(shares_line(square, scene.cue) for square in scene.objects)
        with open(os.path.join(root, f"{split}.txt"), "w", encoding="utf-8") as stream:
            stream.writelines(f"{name}\n" for name in scenes)
        with open(os.path.join(root, f"{split}_scenes.json"), "w", encoding="utf-8") as stream:
            json.dump(scenes, stream)
    manifest = {
        "generator": "ccnet_d2 synthetic",
        "format": _FORMAT,
        "config": asdict(config),
        "classes": class_names(config.num_kinds),
        "objects": objects,
        "objects_on_cross_of_cue": on_cross,
    }
    with open(os.path.join(root, _MANIFEST), "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=2)
        stream.write("\n")


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of the set under `root`, `None` if there is none that can be read."""
    try:
        with open(os.path.join(root, _MANIFEST), encoding="utf-8") as stream:
            manifest = json.load(stream)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return (
        manifest if isinstance(manifest, dict) and manifest.get("generator") == "ccnet_d2 synthetic" else None
    )


def _config_of(manifest: dict[str, Any] | None) -> SyntheticConfig | None:
    """The config a manifest records; `None` for one that this version does not understand."""
    if manifest is None or manifest.get("format") != _FORMAT or not isinstance(manifest.get("config"), dict):
        return None
    if set(manifest["config"]) != {field.name for field in fields(SyntheticConfig)}:
        return None
    return SyntheticConfig(**manifest["config"])


def _is_complete(root: str, config: SyntheticConfig) -> bool:
    """Whether every file the set consists of is there."""
    for split in _SPLITS:
        names = {f"{split}_{index:05d}.png" for index in range(getattr(config, f"{split}_images"))}
        for kind in ("images", "labels"):
            folder = os.path.join(root, kind, split)
            if not os.path.isdir(folder) or not names <= set(os.listdir(folder)):
                return False
        if not all(os.path.isfile(os.path.join(root, split + end)) for end in (".txt", "_scenes.json")):
            return False
    return True


def generate_synthetic_dataset(root: str | os.PathLike[str], config: SyntheticConfig | None = None) -> bool:
    """Write the data set, or leave it alone if exactly this one is already there.

    Files: ``{images,labels}/{train,val}/NAME.png``, split lists ``{train,val}.txt``, the drawn parameters in
    ``{train,val}_scenes.json`` and ``manifest.json``. They are written beside `root` and moved there whole,
    so that `root` is never half a data set and several processes may ask for it at once.

    Args:
        root: folder of the data set; a set made with other parameters is replaced.
        config: what to make; default: :class:`SyntheticConfig` as it stands.

    Returns:
        Whether files were written.

    Raises:
        DatasetError: `root` holds something else, or cannot be written.
    """
    config = config or SyntheticConfig()
    root = os.path.abspath(os.path.expanduser(root))
    if _config_of(read_manifest(root)) == config and _is_complete(root, config):
        return False
    if (
        os.path.lexists(root)
        and read_manifest(root) is None
        and (not os.path.isdir(root) or os.listdir(root))
    ):
        raise DatasetError(
            f"'{root}' holds something other than a synthetic data set; remove it or choose another folder."
        )
    parent = os.path.dirname(root)
    try:
        os.makedirs(parent, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{os.path.basename(root)}-", dir=parent)
    except OSError as error:
        raise DatasetError(
            f"Cannot write the synthetic data set to '{root}': {error.strerror or error}."
        ) from error
    try:
        new = os.path.join(scratch, "new")
        os.mkdir(new)
        _write_set(new, config)
        return _put_in_place(new, root, scratch, config)
    except OSError as error:
        raise DatasetError(
            f"Cannot write the synthetic data set to '{root}': {error.strerror or error}."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(new: str, root: str, scratch: str, config: SyntheticConfig) -> bool:
    """Move a new set to `root`, and what was there to `scratch`; False if another process put the same set there."""
    for turn in itertools.count():
        old = os.path.join(scratch, f"old{turn}")
        with contextlib.suppress(FileNotFoundError):  # none so far, or another process is replacing it
            os.rename(root, old)
        try:
            os.rename(new, root)
            break
        except OSError as error:
            if _config_of(read_manifest(root)) == config and _is_complete(root, config):
                return False
            # Another process was quicker, and what it put there is replaced in its turn, or it is an error.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if os.path.isdir(old) and not os.path.lexists(root):
                    os.rename(old, root)
                raise
    return True


def _load(root: str, split: str, num_kinds: int) -> list[dict[str, Any]]:
    found = _config_of(read_manifest(root))
    if found is None or not _is_complete(root, found):
        raise DatasetError(
            f"There is no complete synthetic data set in '{root}'; make it, in seconds, with "
            f"`python projects/CCNet/tools/make_synthetic_dataset.py --root {root}` or "
            f"`ccnet_d2.data.generate_synthetic_dataset({root!r})`."
        )
    if found.num_kinds != num_kinds:
        raise DatasetError(
            f"The synthetic data set in '{root}' has {found.num_kinds} object classes, but {num_kinds} are "
            "registered; make it again with projects/CCNet/tools/make_synthetic_dataset.py."
        )
    return list_pairs(
        f"ccnet_synthetic_{split}",
        os.path.join(root, "images", split),
        os.path.join(root, "labels", split),
        os.path.join(root, f"{split}.txt"),
    )


def register_synthetic(
    root: str | os.PathLike[str], num_kinds: int = 2, prefix: str = "ccnet_synthetic"
) -> None:
    """Register ``{prefix}_train`` and ``{prefix}_val``.

    The set that lies under `root` is used whatever its sizes; :func:`generate_synthetic_dataset` makes it.

    Args:
        root: folder of the data set.
        num_kinds: number of object classes it has.
        prefix: beginning of the two names.
    """
    root = os.path.expanduser(root)
    for split in _SPLITS:
        register(
            f"{prefix}_{split}",
            partial(_load, root, split, num_kinds),
            stuff_classes=class_names(num_kinds),
            stuff_colors=class_colors(num_kinds),
            ignore_label=255,
            image_root=os.path.join(root, "images", split),
            sem_seg_root=os.path.join(root, "labels", split),
            evaluator_type="sem_seg",
        )
