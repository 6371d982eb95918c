"""The synthetic data set of `synthetic_scenes` as files, and its registration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ccnet_d2.data.datasets.drawn_set import read_manifest, write_drawn_set
from ccnet_d2.data.datasets.folder import list_pairs, register
from ccnet_d2.data.datasets.synthetic_scenes import (
    SPLITS,
    Scene,
    SyntheticConfig,
    class_colors,
    class_names,
    draw_scene,
    label_scene,
    render_scene,
    sample_rng,
    shares_line,
)
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.data.image_files import write_bgr

__all__ = ["generate_synthetic_dataset", "read_synthetic_manifest", "register_synthetic"]

_FORMAT = 2  # of the files; a set written in another one is made again
_MANIFEST = "manifest.json"
_GENERATOR = "ccnet_d2 synthetic"


def _images(config: SyntheticConfig, split: str) -> Iterator[tuple[str, Scene, np.ndarray]]:
    for index in range(getattr(config, f"{split}_images")):
        rng = sample_rng(config, split, index)
        scene = draw_scene(config, rng)
        yield f"{split}_{index:05d}", scene, render_scene(config, scene, rng)


def _write_set(root: Path, config: SyntheticConfig) -> None:
    objects = on_cross = 0
    for split in SPLITS:
        for kind in ("images", "labels"):
            os.makedirs(os.path.join(root, kind, split))
        scenes: dict[str, Any] = {}
        for name, scene, image in _images(config, split):
            write_bgr(os.path.join(root, "images", split, f"{name}.png"), image[:, :, ::-1])
            write_bgr(os.path.join(root, "labels", split, f"{name}.png"), label_scene(config, scene))
            scenes[name] = asdict(scene)
            objects += len(scene.objects)
            on_cross += sum(shares_line(square, scene.cue) for square in scene.objects)
        with open(os.path.join(root, f"{split}.txt"), "w", encoding="utf-8") as stream:
            stream.writelines(f"{name}\n" for name in scenes)
        with open(os.path.join(root, f"{split}_scenes.json"), "w", encoding="utf-8") as stream:
            json.dump(scenes, stream)
    manifest = {
        "generator": _GENERATOR,
        "format": _FORMAT,
        "config": asdict(config),
        "classes": class_names(config.num_kinds),
        "objects": objects,
        "objects_on_cross_of_cue": on_cross,
    }
    with open(os.path.join(root, _MANIFEST), "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=2)
        stream.write("\n")


def read_synthetic_manifest(root: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of the set under `root`, `None` if there is none that can be read."""
    return read_manifest(os.path.join(root, _MANIFEST), _GENERATOR)


def _config_of(manifest: dict[str, Any] | None) -> SyntheticConfig | None:
    """The config a manifest records; `None` for one that this version does not understand."""
    if manifest is None or manifest.get("format") != _FORMAT or not isinstance(manifest.get("config"), dict):
        return None
    if set(manifest["config"]) != {field.name for field in fields(SyntheticConfig)}:
        return None
    return SyntheticConfig(**manifest["config"])


def _is_complete(root: str, config: SyntheticConfig) -> bool:
    """Whether every file the set consists of is there."""
    for split in SPLITS:
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
        config: what to make; default: `SyntheticConfig` as it stands.

    Returns:
        Whether files were written.

    Raises:
        DatasetError: `root` holds something else, or cannot be written.
    """
    config = config or SyntheticConfig()
    root = os.path.abspath(os.path.expanduser(root))
    return write_drawn_set(
        root,
        "synthetic data set",
        lambda new: _write_set(new, config),
        is_there=lambda: _config_of(read_synthetic_manifest(root)) == config and _is_complete(root, config),
        is_ours=lambda: read_synthetic_manifest(root) is not None,
        article="a",
    )


def _load(root: str, split: str, num_kinds: int) -> list[dict[str, Any]]:
    found = _config_of(read_synthetic_manifest(root))
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
    for split in SPLITS:
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
