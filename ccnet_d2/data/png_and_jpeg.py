"""What the bytes of PNG and JPEG files say, before anything is decoded."""

from __future__ import annotations

import re
import struct

__all__ = [
    "bits_of_gray_png",
    "declared_size",
    "is_jpeg",
    "is_png",
    "is_whole",
    "orientation_is_in_xmp",
]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GRAY = 0
_JPEG_START = b"\xff\xd8\xff"
# A marker inside entropy-coded data: FF followed by something that is not a stuffed 00, a restart or a fill
# byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_SOS, _JPEG_EOI = 0xDA, 0xD9
# Markers of the segments that hold the size: start of frame, of which C4, C8 and CC are none.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# What Pillow, and so Detectron2, takes an orientation from where EXIF has none; OpenCV does not.
_XMP_ORIENTATION = b"tiff:Orientation"


def is_png(data: bytes) -> bool:
    """By its first bytes."""
    return data.startswith(_PNG_SIGNATURE)


def is_jpeg(data: bytes) -> bool:
    """By its first bytes."""
    return data.startswith(_JPEG_START)


def is_whole(data: bytes) -> bool:
    """Whether a PNG or JPEG file goes on up to its own end marker."""
    return _png_is_whole(data) if is_png(data) else _jpeg_is_whole(data)


def declared_size(data: bytes) -> tuple[int, int]:
    """Width and height of a whole PNG or JPEG file; zeros if it names none."""
    if is_png(data):
        width, height = struct.unpack_from(">II", data, len(_PNG_SIGNATURE) + 8)
        return width, height
    frame = _jpeg_frame(data)
    if frame is None:
        return 0, 0
    height, width = struct.unpack_from(">HH", data, frame + 5)
    return width, height


def bits_of_gray_png(data: bytes) -> int:
    """Bits of a pixel of a whole PNG file with gray values alone; 0 of any other file."""
    # Bytes 24 and 25 of a PNG file, in its header chunk, are bit depth and colour type.
    return data[24] if is_png(data) and data[25] == _PNG_GRAY else 0


def orientation_is_in_xmp(data: bytes) -> bool:
    """Whether the XMP of a PNG or JPEG file names an orientation. Pixels are not searched: that would take time."""
    if is_jpeg(data):
        return data.find(_XMP_ORIENTATION, 0, _jpeg_frame(data)) >= 0
    before, after = data.find(b"IDAT"), data.rfind(b"IDAT")
    return data.find(_XMP_ORIENTATION, 0, before) >= 0 or data.find(_XMP_ORIENTATION, after) >= 0


def _png_is_whole(data: bytes) -> bool:
    """Whether the chunks of a PNG file go on up to its IEND."""
    position = len(_PNG_SIGNATURE)
    if data[position + 4 : position + 8] != b"IHDR":
        return False
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        position += 12 + length
        if kind == b"IEND":
            return position <= len(data)
    return False


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether the segments of a JPEG file go on up to its own end marker, not that of a thumbnail."""
    position = 2
    while position + 2 <= len(data):
        if data[position] != 0xFF:
            return False
        marker = data[position + 1]
        if marker == _JPEG_EOI:
            return True
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a segment
            position += 2
            continue
        if position + 4 > len(data):
            return False
        (length,) = struct.unpack_from(">H", data, position + 2)
        position += 2 + length
        if marker == _JPEG_SOS:
            found = _JPEG_MARKER.search(data, position)
            if found is None:
                return False
            position = found.start()
    return False


def _jpeg_frame(data: bytes) -> int | None:
    """Where a whole JPEG file's start of frame is, after the metadata."""
    position = 2
    while position + 9 <= len(data) and data[position + 1] != _JPEG_SOS:
        marker = data[position + 1]
        if marker in _JPEG_FRAMES:
            return position
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None
