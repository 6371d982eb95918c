"""Data sets by their registered names, with errors that say what is missing."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ccnet_d2.data.datasets.paths import ENV_VAR
from ccnet_d2.data.errors import DatasetError

__all__ = [
    "check_registered",
    "checked_flip_pairs",
    "classes_of",
    "flip_pairs_of",
    "get_sem_seg_dataset_dicts",
]

_DEFAULT_IGNORE_LABEL = 255


def check_registered(names: str | Sequence[str]) -> list[str]:
    """The names, as a list, once there are data sets of them.

    Raises:
        DatasetError: a name is unknown, or none is given.
    """
    if not names:
        raise DatasetError("No data set is named.")
    listed = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in listed:
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(str(name), list(DatasetCatalog), n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "register it first."
            raise DatasetError(f"There is no data set '{name}'; {hint}")
    return listed


def get_sem_seg_dataset_dicts(names: str | Sequence[str], *, labelled: bool = True) -> list[dict[str, Any]]:
    """Samples of one or several registered data sets, in their order.

    Like Detectron2's ``get_detection_dataset_dicts``, but a data set that is not on disk, Detectron2's own
    included, gives one sentence naming the folder.

    Args:
        names: names of registered data sets.
        labelled: whether every sample has to have a label map. If not, one of each data set has to.

    Returns:
        Detectron2 dicts with `file_name` and `sem_seg_file_name`.

    Raises:
        DatasetError: a name is unknown, or a data set is missing, incomplete, empty, gives something else than such
            dicts, or pairs images with the label maps of others.
    """
    samples: list[dict[str, Any]] = []
    for name in check_registered(names):
        found = _load(name)
        if not found:
            raise DatasetError(f"Data set '{name}' is empty.")
        for record in found:
            if not isinstance(record, Mapping) or "file_name" not in record:
                raise DatasetError(
                    f"Data set '{name}': its loader has to give dicts with 'file_name' and 'sem_seg_file_name', but "
                    f"gave {record!r:.100}."
                )
        without = [sample for sample in found if sample.get("sem_seg_file_name") is None]
        if without and (labelled or len(without) == len(found)):
            raise DatasetError(f"Data set '{name}' has no label map for '{without[0]['file_name']}'.")
        _check_pairs(name, found)
        samples.extend(found)
    return samples


def _load(name: str) -> list[dict[str, Any]]:
    """What a data set's loader gives, Detectron2's own loaders included, with one sentence for what they raise."""
    try:
        samples: list[dict[str, Any]] = list(DatasetCatalog.get(name) or ())  # a loader may be a generator
    except json.JSONDecodeError as error:  # it does not know its file
        start = error.doc[:30] + ("…" if len(error.doc) > 30 else "")
        raise DatasetError(
            f"Data set '{name}': a JSON file of {len(error.doc)} characters that begins with {start!r} is damaged: "
            f"{error.msg} in line {error.lineno}. Copy or download it again."
        ) from error
    except AssertionError as error:
        # Detectron2's own loaders assert that files are there, and that there are no others.
        raise DatasetError(
            f"Data set '{name}' is incomplete, or has a file too many: {str(error).rstrip('.')}. "
            "projects/CCNet/datasets/README.md shows its tree."
        ) from error
    except OSError as error:
        # They stop at the first file or folder that is not there.
        what = getattr(error, "filename", None)
        cause = f"'{what}' does not exist" if isinstance(error, FileNotFoundError) and what else str(error)
        raise DatasetError(
            f"Data set '{name}' is missing or incomplete: {cause.rstrip('.')}. Put it there, or set "
            f"{ENV_VAR} to the folder that holds it; projects/CCNet/datasets/README.md shows its tree."
        ) from error
    return samples


def _check_pairs(name: str, samples: Sequence[dict[str, Any]]) -> None:
    """Refuse images with the label maps of others.

    Detectron2's `load_sem_seg` pairs by order, whatever the names, where there are as many images as label maps: one
    image and another's label map missing shift all between.
    """
    pairs = [
        (_folder_and_stem(s["file_name"]), _folder_and_stem(path))
        for s in samples
        if (path := s.get("sem_seg_file_name")) is not None
    ]
    images = {image for image, _ in pairs}
    for (folder, stem), (label_folder, label_stem) in pairs:
        if label_stem != stem and (folder, label_stem) in images:
            labels = {label for _, label in pairs}
            unlabelled = sorted(s for f, s in images if f == folder and (label_folder, s) not in labels)
            without = sorted(s for f, s in labels if f == label_folder and (folder, s) not in images)
            missing = [f"a label map for '{s}'" for s in unlabelled[:1]] + [
                f"an image for '{s}'" for s in without[:1]
            ]
            raise DatasetError(
                f"Data set '{name}' pairs the image '{stem}' with the label map '{label_stem}', which is another "
                f"image's: '{folder}' and '{label_folder}' have to hold the same names"
                + (f", but there is not {' nor '.join(missing)}." if missing else ".")
            )


def _folder_and_stem(path: str) -> tuple[str, str]:
    folder, file = os.path.split(path)
    return folder, os.path.splitext(file)[0]


def classes_of(names: str | Sequence[str]) -> tuple[list[str], int]:
    """Class names and ignored label that registered data sets agree on.

    Raises:
        DatasetError: a name is not registered, has no classes, or the data sets differ.
    """
    listed = check_registered(names)
    described = []
    for name in listed:
        metadata = MetadataCatalog.get(name)
        classes = metadata.get("stuff_classes")
        if not classes and metadata.get("thing_classes"):
            raise DatasetError(
                f"Data set '{name}' has instances (thing_classes) and no stuff_classes: name a data set for semantic "
                "segmentation."
            )
        if not classes:
            raise DatasetError(
                f"Data set '{name}' is registered without stuff_classes, so its classes are unknown."
            )
        described.append((list(classes), int(metadata.get("ignore_label", _DEFAULT_IGNORE_LABEL))))
    for name, description in zip(listed[1:], described[1:], strict=True):
        if description != described[0]:
            raise DatasetError(
                f"Data sets '{listed[0]}' and '{name}' differ in their classes or ignored label."
            )
    return described[0]


def checked_flip_pairs(pairs: Any, classes: int | None, what: str) -> tuple[tuple[int, int], ...]:
    """Pairs of classes that change places when a picture is mirrored.

    Args:
        pairs: such as [(14, 15), (16, 17)].
        classes: how many there are; None where that is not known.
        what: what the message calls them.

    Raises:
        DatasetError: they are no pairs of different classes, each of which is in one pair at most.
    """
    try:
        listed = tuple((int(one), int(other)) for one, other in pairs)
    except (TypeError, ValueError):
        listed = None
    labels = [label for pair in listed or () for label in pair]
    outside = [label for label in labels if label < 0 or (classes is not None and label >= classes)]
    if listed is None or outside or len(set(labels)) != len(labels):
        known = "its classes" if classes is None else f"its classes 0 to {classes - 1}"
        raise DatasetError(f"{what} is {pairs}, but pairs of {known} are needed, each class once at most.")
    return listed


def flip_pairs_of(names: str | Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of classes that change places when a picture is mirrored, which registered data sets agree on.

    They are the `flip_pairs` of a data set's metadata: left arm and right arm of LIP. Most data sets have none.

    Raises:
        DatasetError: a pair is not two classes of the data set, or the data sets differ.
    """
    listed = [names] if isinstance(names, str) else list(names)
    described = []
    for name in listed:
        metadata = MetadataCatalog.get(name)
        classes = len(metadata.get("stuff_classes") or ())
        pairs = metadata.get("flip_pairs") or ()
        described.append(checked_flip_pairs(pairs, classes, f"Data set '{name}': flip_pairs"))
    for name, pairs in zip(listed[1:], described[1:], strict=True):
        if {frozenset(pair) for pair in pairs} != {frozenset(pair) for pair in described[0]}:
            raise DatasetError(
                f"Data sets '{listed[0]}' and '{name}' differ in the classes that a mirror swaps."
            )
    return described[0] if described else ()
