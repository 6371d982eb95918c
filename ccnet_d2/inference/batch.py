"""Predicting many files and writing a picture for each."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ccnet_d2.data.errors import SampleError
from ccnet_d2.data.image_files import check_label_size, read_label
from ccnet_d2.errors import UserError

from .attention_pictures import draw_attention
from .drawing import readable, stack, text_line
from .images import find_images, writable_format, write_image
from .predictor import Predictor
from .regions import draw_regions, find_regions
from .video_files import VIDEO_CODECS
from .visualize import confidence_map, save_labels, side_by_side

__all__ = ["PICTURES", "BatchResult", "PictureJob", "plan_pictures", "write_pictures"]

PICTURES = ("overlay", "side-by-side", "labels", "confidence", "attention", "regions")


@dataclass
class BatchResult:
    """What became of a batch: files written, and a sentence for each image that could not be read."""

    written: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, job: PictureJob, problem: str | None) -> None:
        """What became of one job."""
        if problem is None:
            self.written.append(job.target)
        else:
            self.problems.append(problem)


@dataclass(frozen=True)
class PictureJob:
    """One image and the picture of it that is wanted.

    Attributes:
        path: the image.
        target: file to write.
        truth: its label map, for "side-by-side".
        picture: see `write_pictures`.
        pixel: (x, y), for "attention".
    """

    path: Path
    target: Path
    truth: Path | None
    picture: str
    pixel: tuple[int, ...] | None

    def problem(self, predictor: Predictor) -> str | None:
        """Do it; the sentence that says so where the image cannot be read."""
        try:
            self._write(predictor)
        except SampleError as error:
            return str(error)
        return None

    def _write(self, predictor: Predictor) -> None:
        if self.picture == "attention":
            assert self.pixel is not None
            write_image(self.target, draw_attention(predictor.attention(self.path, *self.pixel)))
            return
        if self.picture == "regions":
            write_image(self.target, draw_regions(find_regions(predictor, self.path)))
            return
        prediction = predictor(self.path, labels_only=self.picture != "confidence")
        if self.picture == "labels":
            save_labels(self.target, prediction.labels)
        elif self.picture == "confidence":
            write_image(self.target, _confidence_picture(prediction.confidence()))
        elif self.picture == "side-by-side":
            truth = None
            if self.truth is not None:
                truth = read_label(str(self.truth))
                check_label_size(truth, self.truth, prediction.labels, self.path)
            write_image(
                self.target, side_by_side(prediction.image, prediction.labels, prediction.classes, truth)
            )
        else:
            write_image(self.target, prediction.overlay())


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
            picture gets the image's name with `.png`. For one image a new folder's name with an ending of letters
            has to end in a slash, as it may be a mistyped file.
        picture: "overlay" (with a legend), "side-by-side" (image, prediction and, where given, ground truth
            and difference), "labels" (one channel of class indices), "confidence" (of the winning class),
            "attention" (where `pixel` looks) or "regions" (of RANet, with their representative pixels).
        pixel: (x, y) for "attention".
        ground_truth: folder of label maps with the images' names and `.png`, for "side-by-side".
        progress: show a progress bar on stderr.

    Raises:
        UserError: nothing to predict, an output that does not fit the inputs or would overwrite one of them or
            its label map, a missing label map, a pixel outside an image, or an output that cannot be written. All
            that can be known before the first image is checked then.
    """
    jobs = plan_pictures(inputs, output, picture=picture, pixel=pixel, ground_truth=ground_truth)
    result = BatchResult()
    for job in tqdm(jobs, unit="image", disable=not progress):
        result.add(job, job.problem(predictor))
    return result


def plan_pictures(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    picture: str = "overlay",
    pixel: Sequence[int] | None = None,
    ground_truth: str | os.PathLike[str] | None = None,
) -> list[PictureJob]:
    """What there is to do for `write_pictures`, which see; everything is checked that needs no model.

    Raises:
        UserError: as there.
    """
    if picture not in PICTURES:
        raise UserError(f"unknown picture '{picture}': choose one of {', '.join(PICTURES)}.")
    if (picture == "attention") != (pixel is not None):
        raise UserError("an attention picture and the pixel that looks go together: give both or neither.")
    if ground_truth is not None and picture != "side-by-side":
        raise UserError(f"a ground truth is drawn in side-by-side pictures only, not in '{picture}'.")
    if not os.fspath(output):
        raise UserError("the output has no name: give a folder, or a .png.")
    if ground_truth is not None and not os.fspath(ground_truth):
        raise UserError("the ground truth has no name: give a folder.")
    paths = find_images(inputs)
    targets = _targets(paths, os.path.expanduser(output))
    if picture == "labels" and any(target.suffix.lower() != ".png" for target in targets):
        raise UserError(f"label maps are written as .png, which keeps their values; got '{output}'.")
    truths = _truth_files(paths, ground_truth) if ground_truth is not None else [None] * len(paths)
    _check_kept(paths, targets, truths)
    return [
        PictureJob(path, target, truth, picture, None if pixel is None else tuple(pixel))
        for path, target, truth in zip(paths, targets, truths, strict=True)
    ]


def _confidence_picture(confidence: np.ndarray) -> np.ndarray:
    factor = readable(confidence.shape)
    picture = confidence_map(confidence).repeat(factor, axis=0).repeat(factor, axis=1)
    text = f"confidence: dark 0, bright 1; mean {confidence.mean():.2f}"
    return stack([picture, text_line(text, max(picture.shape[1], 240), 13)])


def _targets(paths: Sequence[Path], name: str) -> list[Path]:
    output = Path(name)
    suffix = output.suffix.lower()
    if os.path.isdir(output) or (name.endswith(os.sep) and not os.path.exists(output)):
        suffix = ""
    elif os.path.exists(output) and suffix not in Image.registered_extensions():
        raise UserError(f"output '{output}' is a file without an image suffix: give a folder, or a .png.")
    if suffix in VIDEO_CODECS or (mimetypes.guess_type(f"output{suffix}")[0] or "").startswith("video/"):
        raise UserError(
            f"pictures of images cannot be written to '{output}', a video: give a folder, or a .png; a folder of "
            "frames becomes a video by --video-input (`write_video`)."
        )
    if suffix in Image.registered_extensions():
        if len(paths) > 1:
            raise UserError(f"{len(paths)} images cannot all be written to '{output}': give a folder.")
        writable_format(output)
        targets = [output]
    else:
        if len(paths) == 1 and suffix[1:].isalpha():
            raise UserError(
                f"cannot write '{output}': unknown image type '{output.suffix}', take .png or .jpg; for a folder of "
                f"this name give '{output}{os.sep}'."
            )
        targets = [output / f"{path.stem}.png" for path in paths]
    taken: dict[Path, Path] = {}
    for path, target in zip(paths, targets, strict=True):
        if target in taken:
            raise UserError(f"'{taken[target]}' and '{path}' would both be written to '{target}'.")
        taken[target] = path
    return targets


def _check_kept(paths: Sequence[Path], targets: Sequence[Path], truths: Sequence[Path | None]) -> None:
    """Nothing that is read may be overwritten, under whatever name it is known."""
    read = {file.resolve(): file for file in (*paths, *truths) if file is not None}
    for path, target in zip(paths, targets, strict=True):
        kept = read.get(target.resolve())
        if kept is not None:
            raise UserError(f"the picture of '{path}' would overwrite '{kept}': choose another output.")


def _truth_files(paths: Sequence[Path], folder: str | os.PathLike[str]) -> list[Path]:
    files = [Path(os.path.expanduser(folder)) / f"{path.stem}.png" for path in paths]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"ground truth '{missing[0]}' does not exist ({len(missing)} of {len(files)} missing)."
        )
    return files
