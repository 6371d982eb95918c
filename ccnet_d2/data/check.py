"""Reading a whole data set once and reporting everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from ccnet_d2.data.catalog import classes_of, get_sem_seg_dataset_dicts
from ccnet_d2.data.datasets.folder import is_registered_here, list_pairs
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.image_files import check_label_size, check_record_size, read_image, read_label
from ccnet_d2.wording import listed

__all__ = ["DatasetReport", "check_coverage", "check_dataset", "format_report"]


@dataclass
class DatasetReport:
    """What a data set holds.

    Attributes:
        name: its registered name.
        classes: K class names.
        ignore_label: value of void in the label files.
        samples: number of samples.
        pixels: labelled pixels of each class, (K,).
        images: label maps in which each class occurs, (K,).
        void: pixels of void.
        problems: sentences, each about something that has to be put right.
        notes: sentences about what may be as it should.
    """

    name: str
    classes: list[str]
    ignore_label: int
    samples: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    images: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    void: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Sample:
    """What was found in one sample: values of the label map with their counts, or what is wrong with it."""

    path: str
    values: np.ndarray
    counts: np.ndarray
    problems: list[str]


def _count_values(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if label.dtype == np.uint8:
        counts = np.bincount(label.ravel(), minlength=256)
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(label, return_counts=True)


def _read(sample: dict[str, Any], with_images: bool) -> _Sample:
    path = sample.get("sem_seg_file_name")
    found = _Sample(path or sample["file_name"], np.zeros(0, np.int64), np.zeros(0, np.int64), [])
    image = label = None
    if with_images:
        try:
            image = read_image(sample["file_name"])
            check_record_size(sample, image)
        except SampleError as error:
            found.problems.append(str(error))
    if path is None:
        return found
    try:
        label = read_label(path)
    except SampleError as error:
        found.problems.append(str(error))
    else:
        found.values, found.counts = _count_values(label)
    if image is not None and label is not None:
        try:
            check_label_size(label, path, image, sample["file_name"])
        except SampleError as error:
            found.problems.append(str(error))
    return found


def _judge_values(report: DatasetReport, seen: dict[int, tuple[int, str]]) -> None:
    """Add problems and notes about the values that occur: `seen` is value → (label maps, one of them)."""
    classes = len(report.classes)
    if set(seen) == {0, 255}:
        meaning = "void" if report.ignore_label == 255 else "no class"
        report.problems.append(
            "The label maps hold only 0 and 255, like black and white masks; store the white class as 1, "
            f"since 255 is {meaning} here."
        )
        return
    outside = sorted(v for v in seen if not 0 <= v < classes and v != report.ignore_label)
    for value in outside[:8]:
        maps, example = seen[value]
        report.problems.append(
            f"The value {value} occurs in {maps} label map{'s' * (maps != 1)}, such as '{example}', "
            f"but classes are 0 to {classes - 1} and void is {report.ignore_label}."
        )
    if len(outside) > 8:
        report.problems.append(f"So do the values {listed(outside[8:], 8)}.")
    if outside and 0 not in seen and classes in seen:
        report.notes.append("No label map holds 0: the labels may start at 1 instead of 0.")


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _pairing_problems(name: str, samples: list[dict[str, Any]]) -> list[str]:
    """What Detectron2's own folder loader passes over.

    It drops images without label maps, and if there are as many images as label maps it pairs them by their
    order whatever their names.
    """
    metadata = MetadataCatalog.get(name)
    roots = metadata.get("image_root"), metadata.get("sem_seg_root")
    same = [_stem(sample["file_name"]) == _stem(sample["sem_seg_file_name"]) for sample in samples]
    if None in roots or not any(same):  # not from two folders, or with names that follow another rule
        return []
    try:
        list_pairs(name, *roots)
    except DatasetError as error:
        return [str(error)]
    return []


def check_dataset(
    name: str,
    *,
    with_images: bool = True,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetReport:
    """Read every label map, and every image, of a registered data set.

    Samples without a label map, such as most frames of a video, are noted.

    Args:
        name: registered name.
        with_images: whether to decode the images too and compare sizes.
        threads: files read at once; decoding runs outside Python's lock.
        progress: called with the number of samples done and their total.

    Returns:
        The report; `problems` is empty if all is well.

    Raises:
        DatasetError: the data set is unknown or cannot be listed, as when a folder or label map is missing.
    """
    classes, ignore_label = classes_of(name)
    samples = get_sem_seg_dataset_dicts(name, labelled=False)
    labelled = [sample for sample in samples if sample.get("sem_seg_file_name") is not None]
    report = DatasetReport(name, classes, ignore_label, samples=len(samples))
    if not is_registered_here(name):
        report.problems.extend(_pairing_problems(name, labelled))

    report.pixels = np.zeros(len(classes), np.int64)
    report.images = np.zeros(len(classes), np.int64)
    seen: dict[int, tuple[int, str]] = {}
    all_void: list[str] = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done, found in enumerate(pool.map(lambda sample: _read(sample, with_images), samples), 1):
            report.problems.extend(found.problems)
            for value, count in zip(found.values.tolist(), found.counts.tolist(), strict=True):
                maps, example = seen.get(value, (0, found.path))
                seen[value] = (maps + 1, example)
                if value == ignore_label:
                    report.void += count
                elif 0 <= value < len(classes):
                    report.pixels[value] += count
                    report.images[value] += 1
            if found.values.tolist() == [ignore_label]:
                all_void.append(found.path)
            if progress is not None:
                progress(done, len(samples))
    _judge_values(report, seen)
    if len(labelled) < len(samples):
        bare = [sample["file_name"] for sample in samples if sample.get("sem_seg_file_name") is None]
        report.notes.append(
            f"{len(bare)} of {len(samples)} samples have no label map, such as '{bare[0]}': for runs on clips only."
        )
    if len(all_void) == len(labelled):
        report.problems.append(
            f"Every label map is void throughout: no pixel is of a class, all are {ignore_label}."
        )
    elif all_void:
        report.notes.append(
            f"{len(all_void)} label map{'s are' if len(all_void) > 1 else ' is'} void throughout, such as "
            f"'{all_void[0]}'."
        )
    return report


def check_coverage(train: Sequence[DatasetReport], val: DatasetReport) -> tuple[list[str], list[str]]:
    """Problems and notes about classes that occur only in training or only in validation.

    Args:
        train: reports of the sets that are trained on together, at least one.
        val: report of the validation set.
    """
    problems: list[str] = []
    notes: list[str] = []
    for report in train:
        if report.classes != val.classes:
            problems.append(f"'{report.name}' and '{val.name}' do not have the same classes.")
    if problems:
        return problems, notes
    names = " or ".join(f"'{report.name}'" for report in train)
    for index, label in enumerate(val.classes):
        in_train = any(report.pixels[index] for report in train)
        in_val = bool(val.pixels[index])
        if in_val and not in_train:
            problems.append(f"Class {index} '{label}' occurs in '{val.name}' but never in {names}.")
        elif in_train and not in_val:
            notes.append(f"Class {index} '{label}' never occurs in '{val.name}', so its IoU is not known.")
        elif not in_train:
            notes.append(f"Class {index} '{label}' occurs in none of the sets.")
    return problems, notes


def format_report(report: DatasetReport) -> str:
    """The histogram as a table: each class's pixels, their share of the labelled ones, its label maps."""
    labelled = int(report.pixels.sum())
    total = labelled + report.void
    width = max([len(label) for label in report.classes] + [len("class"), len("void")])
    lines = [
        f"{report.name}: {report.samples} samples, {len(report.classes)} classes, "
        f"void is {report.ignore_label}",
        f"  {'':>3} {'class':<{width}} {'pixels':>14} {'share':>8} {'maps':>7}",
    ]
    for index, label in enumerate(report.classes):
        share = report.pixels[index] / labelled if labelled else 0.0
        pixels, images = report.pixels[index], report.images[index]
        lines.append(f"  {index:>3} {label:<{width}} {pixels:>14} {share:>8.3%} {images:>7}")
    void_share = report.void / total if total else 0.0
    lines.append(f"  {'':>3} {'void':<{width}} {report.void:>14} {void_share:>8.3%} (of all pixels)")
    return "\n".join(lines)
