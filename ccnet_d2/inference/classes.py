"""Names and colours of classes, as pictures need them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from ccnet_d2.errors import UserError

__all__ = ["ClassTable", "distinct_colors"]


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` RGB colours in 0..255 of spread hues (steps of the golden ratio), in three brightnesses."""
    colors = []
    for index in range(count):
        hue = (0.02 + index * 0.618034) % 1.0
        value = (0.95, 0.7, 0.85)[index % 3]
        saturation = (0.75, 0.9, 0.5)[(index // 2) % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


@dataclass(frozen=True)
class ClassTable:
    """K classes.

    Attributes:
        names: K names.
        colors: (K, 3) uint8 RGB.
        ignore_label: label value that stands for no class.
    """

    names: tuple[str, ...]
    colors: np.ndarray
    ignore_label: int = 255

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def create(
        cls, names: Sequence[str], colors: Sequence[Sequence[int]] | None = None, ignore_label: int = 255
    ) -> ClassTable:
        """From plain lists; without `colors`, distinct ones are made.

        Raises:
            ValueError: as many colours as names not given.
        """
        chosen = distinct_colors(len(names)) if colors is None else colors
        if len(chosen) != len(names):
            raise ValueError(f"{len(chosen)} colours for {len(names)} classes.")
        table = np.asarray(chosen, dtype=np.uint8).reshape(-1, 3)
        return cls(tuple(str(name) for name in names), table, int(ignore_label))

    @classmethod
    def numbered(cls, count: int) -> ClassTable:
        """Classes known by number alone."""
        return cls.create([f"class {index}" for index in range(count)])

    @classmethod
    def from_metadata(cls, metadata: Any) -> ClassTable:
        """From Detectron2 metadata (`stuff_classes`, and `stuff_colors` and `ignore_label` where present).

        Raises:
            UserError: the metadata names no classes.
        """
        names = getattr(metadata, "stuff_classes", None)
        if not names:
            raise UserError(
                f"data set '{getattr(metadata, 'name', metadata)}' has no 'stuff_classes' in its metadata: "
                "is it registered, and for semantic segmentation?"
            )
        ignore = getattr(metadata, "ignore_label", None)
        return cls.create(names, getattr(metadata, "stuff_colors", None), 255 if ignore is None else ignore)

    @classmethod
    def from_run(cls, cfg: DictConfig) -> ClassTable | None:
        """Those of the data set that a run is tested on; None where it names none.

        Raises:
            UserError: as in `from_metadata`.
        """
        names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
        if not names:
            return None
        return cls.from_metadata(MetadataCatalog.get(names if isinstance(names, str) else names[0]))
