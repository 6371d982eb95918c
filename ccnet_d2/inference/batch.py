"""Predicting many files and writing a picture for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ccnet_d2.data.errors import SampleError
from ccnet_d2.data.image_files import read_label
from ccnet_d2.errors import UserError

from .attention import draw_attention
from .drawing import readable, stack, text_line
from .images import find_images, write_image
from .predictor import Predictor
from .visualize import confidence_map, save_labels, side_by_side

__all__ = ["PICTURES", "BatchResult", "write_pictures"]

PICTURES = ("overlay", "side-by-side", "labels", "confidence", "attention")


@dataclass
class BatchResult:
    """What became of a batch: files written, and a sentence for each image that could not be read."""

    written: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def write_pictures(
    predictor: Predictor,
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    picture: str = "overlay",
    pixel: Sequence[int] | None = None,
    ground_truth: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> BatchResult:
    """Predict images and write a picture of each; an unreadable image does not stop the rest.

    Args:
        predictor: the model.
        inputs: see `find_images`.
        output: a file (`.png`, `.jpg`) for one image, or a folder, made if need be, where each image's
            picture gets the image's name with `.png`.
        picture: "overlay" (with a legend), "side-by-side" (image, prediction and, where given, ground truth
            and difference), "labels" (one channel of class indices), "confidence" (of the winning class) or
            "attention" (where `pixel` looks).
        pixel: (x, y) for "attention".
        ground_truth: folder of label maps with the images' names and `.png`, for "side-by-side".
        progress: show a progress bar on stderr.

    Raises:
        UserError: nothing to predict, an output that does not fit the inputs, a missing label map, a pixel
            outside an image, or an output that cannot be written. All that can be known before the first
            image is checked then.
    """
    if picture not in PICTURES:
        raise UserError(f"unknown picture '{picture}': choose one of {', '.join(PICTURES)}.")
    if (picture == "attention") != (pixel is not None):
        raise UserError("an attention picture and the pixel that looks go together: give both or neither.")
    if ground_truth is not None and picture != "side-by-side":
        raise UserError(f"a ground truth is drawn in side-by-side pictures only, not in '{picture}'.")
    paths = find_images(inputs)
    targets = _targets(paths, Path(output).expanduser())
    if picture == "labels" and any(target.suffix.lower() != ".png" for target in targets):
        raise UserError(f"label maps are written as .png, which keeps their values; got '{output}'.")
    truths = _truth_files(paths, ground_truth) if ground_truth is not None else [None] * len(paths)

    result = BatchResult()
    for path, target, truth in tqdm(
        list(zip(paths, targets, truths, strict=True)), unit="image", disable=not progress
    ):
        try:
            _write_one(predictor, path, target, picture, pixel, truth)
        except SampleError as error:
            result.problems.append(str(error))
        else:
            result.written.append(target)
    return result


def _write_one(
    predictor: Predictor,
    path: Path,
    target: Path,
    picture: str,
    pixel: Sequence[int] | None,
    truth_file: Path | None,
) -> None:
    if picture == "attention":
        assert pixel is not None
        write_image(target, draw_attention(predictor.attention(path, *pixel)))
        return
    prediction = predictor(path, labels_only=picture != "confidence")
    if picture == "labels":
        save_labels(target, prediction.labels)
    elif picture == "confidence":
        write_image(target, _confidence_picture(prediction.confidence()))
    elif picture == "side-by-side":
        truth = None if truth_file is None else read_label(str(truth_file))
        if truth is not None and truth.shape != prediction.labels.shape:
            raise SampleError(
                f"The label map '{truth_file}' is {truth.shape[1]}x{truth.shape[0]}, but its image '{path}' "
                f"is {prediction.labels.shape[1]}x{prediction.labels.shape[0]}.",
                truth_file,
            )
        write_image(target, side_by_side(prediction.image, prediction.labels, prediction.classes, truth))
    else:
        write_image(target, prediction.overlay())


def _confidence_picture(confidence: np.ndarray) -> np.ndarray:
    factor = readable(confidence.shape)
    picture = confidence_map(confidence).repeat(factor, axis=0).repeat(factor, axis=1)
    text = f"confidence: dark 0, bright 1; mean {confidence.mean():.2f}"
    return stack([picture, text_line(text, max(picture.shape[1], 240), 13)])


def _targets(paths: Sequence[Path], output: Path) -> list[Path]:
    if output.suffix.lower() in Image.registered_extensions() and not output.is_dir():
        if len(paths) > 1:
            raise UserError(f"{len(paths)} images cannot all be written to '{output}': give a folder.")
        targets = [output]
    else:
        if output.exists() and not output.is_dir():
            raise UserError(f"output '{output}' is a file without an image suffix: give a folder, or a .png.")
        targets = [output / f"{path.stem}.png" for path in paths]
    taken: dict[Path, Path] = {}
    for path, target in zip(paths, targets, strict=True):
        if target in taken:
            raise UserError(f"'{taken[target]}' and '{path}' would both be written to '{target}'.")
        if target.exists() and target.resolve() == path.resolve():
            raise UserError(f"the picture of '{path}' would overwrite it: choose another output.")
        taken[target] = path
    return targets


def _truth_files(paths: Sequence[Path], folder: str | os.PathLike[str]) -> list[Path]:
    files = [Path(folder).expanduser() / f"{path.stem}.png" for path in paths]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"ground truth '{missing[0]}' does not exist ({len(missing)} of {len(files)} missing)."
        )
    return files
