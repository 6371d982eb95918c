"""Semantic segmentation from two folders, one of images and one of label maps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ccnet_d2.data.errors import DatasetError
from ccnet_d2.wording import listed

__all__ = [
    "IMAGE_SUFFIXES",
    "default_colors",
    "is_registered_here",
    "list_pairs",
    "read_names",
    "register",
    "register_sem_seg_folder",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def default_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """K distinct RGB colours in 0..255: the PASCAL VOC colour map, which spreads the bits of the index."""
    colors = []
    for index in range(num_classes):
        rgb = [0, 0, 0]
        bits = index
        for shift in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= ((bits >> channel) & 1) << shift
            bits >>= 3
            if not bits:
                break
        colors.append((rgb[0], rgb[1], rgb[2]))
    return colors


def _files_by_stem(folder: str, suffix: str | None, kind: str, name: str, hint: str) -> dict[str, str]:
    """Files under `folder`, searched recursively but for what is hidden, by their relative path without `suffix`."""
    if not os.path.isdir(folder):
        raise DatasetError(f"Data set '{name}': the {kind} folder '{folder}' does not exist.{hint}")

    def fail(error: OSError) -> None:  # os.walk would leave the folder out
        raise DatasetError(
            f"Data set '{name}': the folder '{error.filename}' cannot be read: {error.strerror or error}."
        ) from error

    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and not _leads_back(folder, parent, f)
        )
        for file in sorted(files):
            if file.startswith("."):
                continue
            if suffix is not None:
                if not file.endswith(suffix):
                    continue
                stem = file[: -len(suffix)]
            else:
                stem, extension = os.path.splitext(file)
                if extension.lower() not in IMAGE_SUFFIXES:
                    continue
            path = os.path.join(parent, file)
            key = os.path.relpath(os.path.join(parent, stem), folder).replace(os.sep, "/")
            if key in found:
                raise DatasetError(
                    f"Data set '{name}': '{found[key]}' and '{path}' have the same name; keep one of them."
                )
            found[key] = path
    if not found:
        raise DatasetError(
            f"Data set '{name}': the {kind} folder '{folder}' holds no {suffix or 'image'} files.{hint}"
        )
    return found


def _leads_back(root: str, parent: str, folder: str) -> bool:
    """Whether `folder` is a link to what it was reached through from `root`, or to what that lies in.

    ``ln -s`` leaves one when it is called twice, and so do two folders that link to each other.
    """
    path = os.path.join(parent, folder)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    way = Path(parent).relative_to(root).parts
    passed = (os.path.realpath(Path(root, *way[:depth])) for depth in range(len(way) + 1))
    return any(os.path.commonpath([target, place]) == target for place in passed)


def _some(names: Sequence[str]) -> str:
    return listed((f"'{name}'" for name in names), 3)


def read_names(path: str | os.PathLike[str], what: str, hint: str = "") -> list[str]:
    """The names in a list of one a line.

    Args:
        path: a text file.
        what: what messages call it.
        hint: what they end with where the list is empty.

    Raises:
        DatasetError: it cannot be read, names nothing, or something twice.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            names = [line.strip() for line in stream if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DatasetError(f"{what} cannot be read: {reason}.") from error
    if not names:
        raise DatasetError(f"{what} is empty.{hint}")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise DatasetError(f"{what} names {_some(doubled)} twice.")
    return names


def _read_split(split_file: str, name: str, hint: str) -> list[str]:
    what = f"Data set '{name}': the split list '{split_file}'"
    if not os.path.isfile(split_file):
        raise DatasetError(f"{what} does not exist.{hint}")
    return read_names(split_file, what, hint)


def list_pairs(
    name: str,
    image_dir: str,
    label_dir: str,
    split_file: str | None = None,
    *,
    image_suffix: str | None = None,
    label_suffix: str | None = None,
    hint: str = "",
) -> list[dict[str, Any]]:
    """Pair images and label maps of the same name.

    Args:
        name: data set name, for error messages.
        image_dir: folder of images, searched recursively.
        label_dir: folder of label maps with the same relative names.
        split_file: text file with one name per line (no suffix, relative to the folders). Without it every
            file is taken and each image must have a label map and the other way round.
        image_suffix: end of the image files' names that is not part of the name, such as
            ``"_leftImg8bit.png"``; files that end otherwise are passed over. ``None``: any image file, its
            extension is dropped.
        label_suffix: the same for label maps, such as ``"_gtFine_labelTrainIds.png"``.
        hint: a sentence saying how to get the data set, appended to errors about missing folders.

    Returns:
        Detectron2 dicts with `file_name`, `sem_seg_file_name` and `image_id`, ordered by name (or as listed).

    Raises:
        DatasetError: a folder or split list is missing or cannot be read, an image or label map is missing, or two
            files have one name.
    """
    hint = f" {hint}" if hint else ""
    images = _files_by_stem(image_dir, image_suffix, "image", name, hint)
    labels = _files_by_stem(label_dir, label_suffix, "label", name, hint)
    if split_file is None:
        stems = sorted(images.keys() | labels.keys())
    else:
        stems = _read_split(split_file, name, hint)
    for kind, folder, files, other in (
        ("image", image_dir, images, label_dir),
        ("label map", label_dir, labels, image_dir),
    ):
        missing = [stem for stem in stems if stem not in files]
        if missing:
            bare = os.path.splitext(missing[0])[0]
            suffixed = split_file is not None and bare in files
            advice = f": names in a list are without suffix, such as '{bare}'" if suffixed else ""
            raise DatasetError(
                f"Data set '{name}': '{folder}' has no {kind} for {_some(missing)}, "
                f"which '{split_file or other}' names{advice}."
            )
    return [{"file_name": images[s], "sem_seg_file_name": labels[s], "image_id": s} for s in stems]


def register_sem_seg_folder(
    name: str,
    image_dir: str | os.PathLike[str],
    label_dir: str | os.PathLike[str],
    classes: Sequence[str],
    colors: Sequence[Sequence[int]] | None = None,
    ignore_label: int = 255,
    split_file: str | os.PathLike[str] | None = None,
    *,
    image_suffix: str | None = None,
    label_suffix: str | None = None,
    hint: str = "",
) -> None:
    """Register two folders as a semantic segmentation data set. Nothing is read before the first use.

    Calling it again with the same name replaces the earlier registration, so a config file may be loaded
    twice.

    Args:
        name: name under which configs refer to the data set.
        image_dir: folder of images (``~`` is expanded).
        label_dir: folder of label maps, one 8- or 16-bit channel (or palette) holding class indices.
        classes: K class names; label value i is ``classes[i]``.
        colors: K RGB colours in 0..255 for pictures; default: the PASCAL VOC colour map.
        ignore_label: label value of pixels that count neither in the loss nor in the evaluation.
        split_file, image_suffix, label_suffix, hint: see :func:`list_pairs`.

    Raises:
        DatasetError: no list of classes, not as many colours, a colour that is none, an ignored label that is no
            whole number or a class, or a name that Detectron2 or another library has registered.
    """
    if isinstance(classes, str):
        raise DatasetError(f"Data set '{name}': classes is {classes!r}, but a list of names is needed.")
    classes = list(classes)
    rgb = default_colors(len(classes)) if colors is None else [_rgb(color, name) for color in colors]
    if not classes:
        raise DatasetError(f"Data set '{name}': give at least one class name.")
    if len(set(classes)) != len(classes):
        raise DatasetError(f"Data set '{name}': two classes have the same name in {classes}.")
    if len(rgb) != len(classes):
        raise DatasetError(f"Data set '{name}': {len(rgb)} colours for {len(classes)} classes.")
    if not isinstance(ignore_label, Integral):
        raise DatasetError(
            f"Data set '{name}': ignore_label is {ignore_label!r}, but a whole number is needed; where nothing is "
            "void, one that does not occur, such as 255."
        )
    if 0 <= ignore_label < len(classes):
        raise DatasetError(
            f"Data set '{name}': ignore_label {ignore_label} is class '{classes[ignore_label]}'; "
            f"take a value of {len(classes)} or more."
        )
    images, labels = os.path.expanduser(image_dir), os.path.expanduser(label_dir)
    split = os.path.expanduser(split_file) if split_file is not None else None

    register(
        name,
        partial(
            list_pairs,
            name,
            images,
            labels,
            split,
            image_suffix=image_suffix,
            label_suffix=label_suffix,
            hint=hint,
        ),
        stuff_classes=classes,
        stuff_colors=rgb,
        ignore_label=ignore_label,
        image_root=images,
        sem_seg_root=labels,
        evaluator_type="sem_seg",
    )


def _rgb(color: Sequence[int], name: str) -> tuple[int, int, int]:
    try:
        red, green, blue = (int(value) for value in color)
        exact = all(0 <= value <= 255 and value == int(value) for value in color)
    except (TypeError, ValueError):
        exact = False
    if not exact:
        raise DatasetError(
            f"Data set '{name}': the colour {color} is not red, green and blue in whole numbers from 0 to 255."
        )
    return red, green, blue


_REGISTERED_HERE: set[str] = set()


def register(name: str, loader: Callable[[], list[dict[str, Any]]], **metadata: Any) -> None:
    """Put a data set into Detectron2's catalogs, replacing an earlier registration made here.

    Args:
        name: data set name.
        loader: function without arguments that returns Detectron2 dicts; called at each use, not now.
        metadata: attributes of ``MetadataCatalog.get(name)``.

    Raises:
        DatasetError: somebody else has registered the name.
    """
    if name in DatasetCatalog:
        if name not in _REGISTERED_HERE:
            raise DatasetError(
                f"Data set '{name}' is already registered by another library; choose another name."
            )
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**metadata)
    _REGISTERED_HERE.add(name)


def is_registered_here(name: str) -> bool:
    """Whether :func:`register` put the data set into the catalogs."""
    return name in _REGISTERED_HERE
