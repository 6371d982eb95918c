"""Image files: finding and writing them so that a failure is one clear sentence and leaves nothing behind.

Reading is `ccnet_d2.data.image_files.read_image`, so that predictions see the pixels that training and
evaluation see.
"""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ccnet_d2.data.image_files import upright
from ccnet_d2.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "ImageFileError", "as_rgb", "find_images", "writable_format", "write_image"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageFileError(UserError):
    """An image cannot be found or written; the message names it."""


def find_images(inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files named by paths, folders (their images, not those of subfolders) and glob patterns.

    Args:
        inputs: one or more paths or patterns; `~` is expanded.

    Returns:
        Files in the order given, those of a folder or pattern by name; each once.

    Raises:
        ImageFileError: a path is empty, does not exist or may not be looked up, a folder holds no image or a pattern
            matches none.
    """
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    found: dict[Path, None] = {}
    for item in inputs:
        try:
            found.update(dict.fromkeys(_files_of(item)))
        except OSError as error:  # a folder that may not be looked into, a name too long to be one
            raise ImageFileError(f"'{item}' cannot be looked up: {error.strerror or error}.") from error
    if not found:
        raise ImageFileError("no image given: name files, folders or patterns.")
    return list(found)


def as_rgb(image: object) -> np.ndarray:
    """A Pillow image or array as (H, W, 3) uint8 RGB.

    Args:
        image: Pillow image of any mode, which is turned as its EXIF says, as files are; or uint8 array (H, W),
            (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.

    Raises:
        TypeError: something else.
        ValueError: an array of another shape or dtype, or an empty one.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"an image must have pixels, got {image.width}x{image.height}.")
        return _to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected a path, a Pillow image or a numpy array, got {type(image).__name__}.")
    if image.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8 in 0..255, got {image.dtype}.")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or image.size == 0:
        raise ValueError(f"an image array must be (H, W, 3) RGB or (H, W) grey, got shape {image.shape}.")
    channels = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
    return np.ascontiguousarray(channels)


def writable_format(path: str | os.PathLike[str]) -> str:
    """The format that the file's suffix names.

    Raises:
        ImageFileError: it names none that can be written.
    """
    suffix = Path(path).suffix
    name = Image.registered_extensions().get(suffix.lower())
    if name not in Image.SAVE:
        raise ImageFileError(f"cannot write '{path}': unknown image type '{suffix}', take .png or .jpg.")
    return name


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8, or (H, W) int16 class indices, in the format of the file's suffix.

    The file appears whole or not at all: it is written beside its place under another name and then moved.

    Raises:
        ImageFileError: unknown suffix, or the folder cannot be written.
    """
    path = Path(path)
    image_format = writable_format(path)
    if image.dtype == np.int16:
        image = image.astype(np.uint16)  # what PNG holds; class indices are not negative
    part = path.with_name(f".{secrets.token_hex(8)}.part")  # the name itself may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageFileError(
            f"cannot write '{path}': folder '{path.parent}' cannot be made, {error.strerror or error}."
        ) from error
    try:
        Image.fromarray(np.ascontiguousarray(image)).save(part, format=image_format)
        os.replace(part, path)
    except (OSError, ValueError) as error:  # the latter: larger than the format allows
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ImageFileError(f"cannot write '{path}': {reason.rstrip('.')}.") from error
    finally:
        part.unlink(missing_ok=True)


def _files_of(item: str | os.PathLike[str]) -> list[Path]:
    text = os.path.expanduser(os.fspath(item))
    if not text:  # which would be the current folder
        raise ImageFileError("an image has an empty name: name a file, a folder or a pattern.")
    path = Path(text)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_image_name(file))
        if not files:
            raise ImageFileError(f"folder '{item}' holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(text):
        raise ImageFileError(f"image '{item}' does not exist.")
    files = sorted(Path(match) for match in glob.glob(text, recursive=True) if _is_image_name(Path(match)))
    if not files:
        raise ImageFileError(f"pattern '{item}' matches no image.")
    return files


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        raise ImageFileError(
            f"images of Pillow mode '{image.mode}' are not 8 bits per channel; convert them first."
        )
    return np.asarray(upright(image).convert("RGB")).copy()
