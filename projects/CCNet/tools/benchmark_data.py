#!/usr/bin/env python3
"""Measure how many training images per second the input pipeline delivers, and where the time goes.

Without a data set it writes a few images of the size of Cityscapes, as PNG files with about as many bytes
each, into a temporary folder, so that it runs anywhere.

Examples:
    python projects/CCNet/tools/benchmark_data.py
    python projects/CCNet/tools/benchmark_data.py --dataset camvid_sem_seg_train --crop 360 --workers 0 1 2
    python projects/CCNet/tools/benchmark_data.py --config-file my_run.py --crop 512
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

# isort: split
import cv2
import numpy as np
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng
from omegaconf import OmegaConf

from ccnet_d2.data import (
    SemSegMapper,
    classes_of,
    get_sem_seg_dataset_dicts,
    register_sem_seg_folder,
)
from ccnet_d2.data.image_files import read_image, read_label
from ccnet_d2.data.sem_seg_mapper import LabelMap
from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomScaleCrop
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config
from ccnet_d2.script_exit import exit_with

NAME = "benchmark_data_street"
CLASSES = 19
COARSEST = 64
"""Pixels across one region of the made-up label maps."""


def write_street(root: str, images: int, height: int, width: int) -> None:
    """Write smooth, slightly noisy images and label maps of large regions, which compress like streets."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        os.makedirs(os.path.join(root, folder))
    for index in range(images):
        coarse = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
        image = np.clip(np.rint(image + rng.normal(0, 0.8, image.shape)), 0, 255).astype(np.uint8)
        regions = rng.integers(0, CLASSES, (height // COARSEST, width // COARSEST), dtype=np.uint8)
        label = cv2.resize(regions, (width, height), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(os.path.join(root, "images", f"{index:03d}.png"), image)
        cv2.imwrite(os.path.join(root, "labels", f"{index:03d}.png"), label)


def augmentations(crop: int) -> list[T.Augmentation]:
    """Everything mmseg's Cityscapes recipe does."""
    return [
        RandomScaleCrop(crop, scale_range=(0.5, 2.0), category_max_ratio=0.75),
        T.RandomFlip(),
        RandomPhotometricDistortion(),
    ]


def training_set(config_file: str) -> str:
    """The name of the set that a run is trained on; of several, the first."""
    names = OmegaConf.select(get_config(config_file), "dataloader.train.dataset.names")
    if not names:
        raise UserError(f"The config file '{config_file}' has no dataloader.train.dataset.names.")
    return names if isinstance(names, str) else names[0]


def milliseconds(function: Callable[[int], object], count: int) -> float:
    """Mean time of a call."""
    start = time.perf_counter()
    for index in range(count):
        function(index)
    return (time.perf_counter() - start) / count * 1e3


def stages(dataset: list[dict], name: str, crop: int, count: int) -> list[tuple[str, float]]:
    """Milliseconds per image of each stage, in this process with one thread."""
    cv2.setNumThreads(0)
    seed_all_rng(0)
    classes, ignore = classes_of(name)
    label_map = LabelMap(len(classes), ignore)
    some = [dataset[i % len(dataset)] for i in range(count)]
    loaded = [(read_image(d["file_name"]), read_label(d["sem_seg_file_name"])) for d in some[:4]]

    def of(index: int) -> tuple[np.ndarray, np.ndarray]:
        return loaded[index % len(loaded)]

    scale_crop, flip, photometric = augmentations(crop)
    cropped = []
    for image, label in loaded:
        augmented = T.AugInput(image, sem_seg=label)
        scale_crop(augmented)
        cropped.append((augmented.image, augmented.sem_seg))

    def finish(index: int) -> object:
        image, label = cropped[index % len(cropped)]
        return (
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            torch.from_numpy(label.astype(np.int64)),
        )

    mapper = SemSegMapper(True, augmentations=augmentations(crop), dataset_names=name)
    return [
        ("read and decode image", milliseconds(lambda i: read_image(some[i]["file_name"]), count)),
        (
            "read and decode label map",
            milliseconds(lambda i: read_label(some[i]["sem_seg_file_name"]), count),
        ),
        ("check label values", milliseconds(lambda i: label_map(of(i)[1], ""), count)),
        ("scale and crop", milliseconds(lambda i: scale_crop(T.AugInput(of(i)[0], sem_seg=of(i)[1])), count)),
        ("flip", milliseconds(lambda i: flip(T.AugInput(cropped[i % len(cropped)][0])), count)),
        (
            "photometric distortion",
            milliseconds(lambda i: photometric(T.AugInput(cropped[i % len(cropped)][0])), count),
        ),
        ("to tensors", milliseconds(finish, count)),
        ("the whole mapper", milliseconds(lambda i: mapper(some[i]), count)),
    ]


def images_per_second(
    dataset: list[dict], name: str, crop: int, workers: int, batch: int, seconds: float
) -> float:
    """Rate at which Detectron2's training loader delivers, start-up excluded."""
    seed_all_rng(0)
    loader = build_detection_train_loader(
        dataset,
        mapper=SemSegMapper(True, augmentations=augmentations(crop), dataset_names=name),
        total_batch_size=batch,
        aspect_ratio_grouping=False,
        num_workers=workers,
    )
    batches = iter(loader)
    # Every worker starts with two batches in the queue; they would come for free.
    for _ in range(2 * max(workers, 1)):
        next(batches)
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        done += batch
    return done / elapsed


def at_least(least: int) -> Callable[[str], int]:
    """Type of an argument that is a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} on")
        return value

    return parse


def positive_seconds(text: str) -> float:
    """Type of an argument that is a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="a registered data set (default: made-up images)")
    source.add_argument(
        "--config-file", metavar="FILE", help="run whose training set to read: a path or a model zoo name"
    )
    parser.add_argument(
        "--size",
        type=at_least(COARSEST),
        nargs=2,
        metavar=("H", "W"),
        help=f"of made-up images, {COARSEST} at least (default: 1024 2048)",
    )
    parser.add_argument("--crop", type=at_least(1), default=769, help="side of the crop (default: 769)")
    parser.add_argument(
        "--workers",
        type=at_least(0),
        nargs="+",
        default=[0, 1, 2],
        help="worker counts to measure (default: 0 1 2)",
    )
    parser.add_argument("--batch", type=at_least(1), default=4, help="images per batch (default: 4)")
    parser.add_argument(
        "--seconds", type=positive_seconds, default=8.0, help="time of each measurement (default: 8)"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=24, help="images timed stage by stage (default: 24)"
    )
    args = parser.parse_args(argv)
    if args.size is not None and (args.dataset or args.config_file):
        parser.error("--size is of made-up images, not of those of --dataset and --config-file")
    args.size = args.size or (1024, 2048)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run benchmark_data.py; returns its exit status."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            name = args.dataset
            if args.config_file:
                name = training_set(args.config_file)
            if name is None:
                name = NAME
                write_street(scratch, 8, *args.size)
                classes = [f"class {i}" for i in range(CLASSES)]
                register_sem_seg_folder(name, f"{scratch}/images", f"{scratch}/labels", classes)
            dataset = get_sem_seg_dataset_dicts(name)
            measured = stages(dataset, name, args.crop, args.images)
            mean_bytes = np.mean([os.path.getsize(d["file_name"]) for d in dataset[:100]])
            print(f"{name}: {mean_bytes / 2**20:.2f} MiB per image file, crop {args.crop}, one thread")
            for stage, time_ms in measured:
                print(f"  {stage:<28}{time_ms:8.2f} ms")
            for workers in args.workers:
                rate = images_per_second(dataset, name, args.crop, workers, args.batch, args.seconds)
                print(f"  {workers} worker{'s' * (workers != 1)}: {rate:.1f} images/s")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    exit_with(main)
