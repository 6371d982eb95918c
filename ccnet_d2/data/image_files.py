"""Reading and writing of images and label maps with OpenCV, strict about what is wrong with a file.

OpenCV's decoders are as fast as any, but forgiving where a training run should not be: depending on version
and format they return what could be decoded of a truncated file, and they turn palette label maps into
colours. Both are handled here. What writes files says that it did even where the disk is full.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, UnidentifiedImageError

from ccnet_d2.data.errors import SampleError

from .png_and_jpeg import bits_of_gray_png, declared_size, is_jpeg, is_png, is_whole, orientation_is_in_xmp

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "check_label_size",
    "check_record_size",
    "read_image",
    "read_label",
    "upright",
    "write_bgr",
]

MAX_PIXELS = 178_956_970
"""The largest image that is decoded, Pillow's own limit: a file of kilobytes can declare terabytes."""

MAX_BYTES = 2**30
"""The largest file that is read."""

# Of Pillow; converting the others to RGB cuts their values off at 255.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Pillow's names of what alters the values of a TIFF file.
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")
# By the orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _read_bytes(path: str, kind: str) -> bytes:
    try:
        _check_regular(path, kind)
        with PathManager.open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise SampleError(f"The {kind} '{path}' cannot be read: {error.strerror or error}.", path) from error
    if not data:
        raise SampleError(f"The {kind} '{path}' is an empty file.", path)
    return data


def _check_regular(path: str, kind: str) -> None:
    """Refuse what would never end or not fit into memory: pipes, devices, very large files."""
    try:
        status = os.stat(path)
    except OSError:  # not a local path, or PathManager will tell what is wrong
        return
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise SampleError(f"The {kind} '{path}' is not a file but a pipe, socket or device.", path)
    if status.st_size > MAX_BYTES:
        raise SampleError(
            f"The {kind} '{path}' has {status.st_size} bytes, more than the {MAX_BYTES} that are read.", path
        )


def _check_whole(data: bytes, path: str, kind: str) -> None:
    if not (is_png(data) or is_jpeg(data)):
        return
    if not is_whole(data):
        raise SampleError(
            f"The {kind} '{path}' is truncated ({len(data)} bytes); copy or download it again.", path
        )
    _check_size(declared_size(data), path, kind)


def _check_size(size: tuple[int, int], path: str, kind: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise SampleError(
            f"The {kind} '{path}' is {width}x{height}, more than the {MAX_PIXELS} pixels that are decoded; "
            "cut it into tiles.",
            path,
        )


def _decode_with_pillow(data: bytes, path: str, kind: str, mode: str | None = None) -> np.ndarray:
    with _opened_by_pillow(data, path, kind) as image:
        _check_size(image.size, path, kind)
        if mode and image.mode in _DEEP_MODES:
            raise SampleError(
                f"The {kind} '{path}' holds {image.mode} values of Pillow, not 8 bits a channel; convert it.",
                path,
            )
        if not mode and image.info.get("compression") in _LOSSY_COMPRESSIONS:
            raise SampleError(
                f"The {kind} '{path}' is compressed as JPEG or WebP, which alters labels; store it as PNG.",
                path,
            )
        image = upright(image)
        return np.asarray(image.convert(mode) if mode else image)


def _turn_of_file(data: bytes, path: str, kind: str) -> Image.Transpose | None:
    with _opened_by_pillow(data, path, kind) as image:
        return _turn(image)


@contextlib.contextmanager
def _opened_by_pillow(data: bytes, path: str, kind: str) -> Iterator[Image.Image]:
    """What Pillow finds wrong with the file, within the block too, is told as of this file."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(
            f"The {kind} '{path}' cannot be decoded; it is damaged or no image.", path
        ) from error
    # Pillow's decoders raise these for files they cannot make sense of.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise SampleError(f"The {kind} '{path}' cannot be decoded: {error}.", path) from error


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF, or else its XMP, says that it is to be seen; as it is where EXIF is damaged.

    Not `ImageOps.exif_transpose`, which writes EXIF anew and so fails on some that can be read.
    """
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format == "TIFF":  # Pillow turns it as it loads
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except SyntaxError:  # "not a TIFF file", which EXIF is inside
        return None


def _decode_with_opencv(data: bytes, path: str, kind: str, flags: int) -> np.ndarray:
    turn = None
    if orientation_is_in_xmp(data):
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
        turn = _turn_of_file(data, path, kind)
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # such as an image beyond OpenCV's limit of 2^30 pixels
        raise SampleError(f"The {kind} '{path}' cannot be decoded: {error.err}.", path) from error
    if decoded is None:
        raise SampleError(f"The {kind} '{path}' cannot be decoded; it is damaged or no image.", path)
    return decoded if turn is None else np.array(Image.fromarray(decoded).transpose(turn))


def read_image(path: str, image_format: str = "RGB") -> np.ndarray:
    """Read a colour image.

    Gray images get three equal channels, alpha is dropped, 16 bits become 8, and an orientation given in EXIF, or
    else in XMP, is applied, as Detectron2 does.

    Args:
        path: any path that Detectron2's `PathManager` opens.
        image_format: ``"RGB"`` or ``"BGR"``.

    Returns:
        (H, W, 3) uint8.

    Raises:
        SampleError: the file is missing, empty, truncated or no image.
    """
    data = _read_bytes(path, "image")
    _check_whole(data, path, "image")
    if is_png(data) or is_jpeg(data):
        image = _decode_with_opencv(data, path, "image", cv2.IMREAD_COLOR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image_format == "RGB" else image
    # The other formats are rare; Pillow notices when one of their files is cut short.
    image = _decode_with_pillow(data, path, "image", "RGB")
    return image if image_format == "RGB" else np.ascontiguousarray(image[:, :, ::-1])


def read_label(path: str) -> np.ndarray:
    """Read a label map: one channel of class indices, as gray values (of 1 to 16 bits) or as indices into a palette.

    An orientation given in EXIF or XMP is applied, as to images.

    Args:
        path: any path that Detectron2's `PathManager` opens.

    Returns:
        (H, W) uint8, or uint16 / int32 for files that hold more than 8 bits.

    Raises:
        SampleError: the file is missing, empty, truncated, no image, in a lossy format, or holds colours.
    """
    data = _read_bytes(path, "label map")
    _check_whole(data, path, "label map")
    if is_jpeg(data):
        raise SampleError(
            f"The label map '{path}' is a JPEG file, which alters labels; store it as PNG.", path
        )
    bits = bits_of_gray_png(data)
    if bits >= 8:
        # Not IMREAD_UNCHANGED, which leaves out EXIF, and so would not lie on an image that is turned.
        label = _decode_with_opencv(data, path, "label map", cv2.IMREAD_ANYDEPTH)
    else:
        label = _decode_with_pillow(data, path, "label map")
        if label.dtype == bool:
            label = label.astype(np.uint8)
        elif bits:
            # Decoders spread 2 and 4 bits over 0 to 255, for which class 3, or 15, would be the usual void.
            label = label // (255 // (2**bits - 1))
    if label.ndim != 2:
        raise SampleError(
            f"The label map '{path}' has {label.shape[2]} channels, but one channel of class indices is "
            "needed; if these are colours, convert them to indices first.",
            path,
        )
    if label.dtype.kind not in "ui":
        raise SampleError(
            f"The label map '{path}' holds {label.dtype} values, but class indices are needed.", path
        )
    return label


def write_bgr(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write an image or a label map in the format of the file's suffix.

    Args:
        path: a local path.
        image: (H, W) or (H, W, 3) uint8; colours are BGR.

    Raises:
        OSError: it cannot be written.
    """
    encoded, data = cv2.imencode(os.path.splitext(path)[1], image)
    assert encoded, path
    with open(path, "wb") as stream:
        stream.write(data)


def check_record_size(record: Mapping[str, Any], image: np.ndarray) -> None:
    """
    Args:
        record: a data set dict with `file_name`, and maybe `height` and `width`.
        image: (H, W) or (H, W, C), what the file holds.

    Raises:
        SampleError: the record names another size.
    """
    height, width = image.shape[:2]
    expected = (record.get("height", height), record.get("width", width))
    if expected != (height, width):
        path = record["file_name"]
        raise SampleError(
            f"The image '{path}' is {width}x{height}, but the data set says {expected[1]}x{expected[0]}.",
            path,
        )


def check_label_size(
    label: np.ndarray, path: str | os.PathLike[str], image: np.ndarray, image_path: str | os.PathLike[str]
) -> None:
    """
    Args:
        label: (H, W).
        path: the label map's file.
        image: (H, W) or (H, W, C), the image or something of its size.
        image_path: the image's file.

    Raises:
        SampleError: the two differ in size.
    """
    if label.shape != image.shape[:2]:
        raise SampleError(
            f"The label map '{path}' is {label.shape[1]}x{label.shape[0]}, but its image '{image_path}' is "
            f"{image.shape[1]}x{image.shape[0]}.",
            path,
        )
