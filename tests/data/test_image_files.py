"""Reading of image and label files, whole and damaged."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image, PngImagePlugin

from ccnet_d2.data import SampleError
from ccnet_d2.data.image_files import read_image, read_label

RNG = np.random.default_rng(0)
PIXELS = cv2.resize(RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)


def _encoded(suffix: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, suffix, **options)
    return stream.getvalue()


def _with_thumbnail() -> bytes:
    """A JPEG file whose Exif holds a whole JPEG file, end marker and all."""
    thumbnail = io.BytesIO()
    Image.fromarray(PIXELS[::4, ::4]).save(thumbnail, "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail.getvalue()
    plain = _encoded("JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


def _with_padding() -> bytes:
    """A JPEG file with what may stand between its segments: fill bytes, and markers that have no segment."""
    data, position = _encoded("JPEG", quality=95), 2
    padded = bytearray(data[:position])
    while True:
        (length,) = struct.unpack_from(">H", data, position + 2)
        padded += b"\xff\x01" + b"\xff\xd3" + b"\xff" * 3 + data[position : position + 2 + length]
        position += 2 + length
        if data[position - 2 - length + 1] == 0xDA:  # the pixels follow
            return bytes(padded + data[position:-2] + b"\xff" * 3 + data[-2:])


FORMATS = {
    "png": _encoded("PNG"),
    "png-stored": _encoded("PNG", compress_level=0),
    "jpg": _encoded("JPEG", quality=95),
    "jpg-progressive": _encoded("JPEG", progressive=True, quality=95),
    "jpg-restarts": _encoded("JPEG", restart_marker_blocks=4),
    "jpg-thumbnail": _with_thumbnail(),
    "jpg-padded": _with_padding(),
    "bmp": _encoded("BMP"),
    "tif": _encoded("TIFF", compression="tiff_lzw"),
    "webp": _encoded("WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_same_pixels_as_pillow(tmp_path: Path, kind: str, order: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(FORMATS[kind])
    # Pillow takes a marker without a segment for damage: it reads the file that was padded.
    with Image.open(io.BytesIO(FORMATS[kind.removesuffix("-padded")])) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    found = read_image(str(path), order)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    # The two libraries round JPEG colours differently.
    np.testing.assert_allclose(
        found if order == "RGB" else found[..., ::-1], expected, atol=4 * kind.startswith("jpg")
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (path := tmp_path / "image").write_bytes(FORMATS[kind])
    monkeypatch.setattr("ccnet_d2.data.image_files.MAX_PIXELS", 96 * 64)
    assert read_image(str(path)).shape == (64, 96, 3)
    monkeypatch.setattr("ccnet_d2.data.image_files.MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(SampleError, match="is 96x64, more than the 6143 pixels"):
        read_image(str(path))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_truncated_images_are_noticed(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "cut.img"
    path.write_bytes(FORMATS[kind][: int(len(FORMATS[kind]) * kept)])
    with pytest.raises(SampleError, match=r"image '.*cut\.img' (is truncated|cannot be decoded)") as error:
        read_image(str(path))
    assert error.value.path == str(path)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind.startswith(("png", "jpg"))])
def test_a_missing_last_byte_is_noticed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cut.img"
    path.write_bytes(FORMATS[kind][:-1])
    with pytest.raises(SampleError, match="is truncated"):
        read_image(str(path))


def test_bytes_after_the_end_do_no_harm(tmp_path: Path) -> None:
    for kind in ("png", "jpg", "jpg-progressive"):
        path = tmp_path / kind
        path.write_bytes(FORMATS[kind] + b"\0" * 100)
        assert read_image(str(path)).shape == PIXELS.shape


def test_unusable_images(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    with pytest.raises(SampleError, match=r"'.*image\.png' cannot be read: No such file"):
        read_image(str(path))
    for data, message in (
        (b"", "is an empty file"),
        (b"this is a text", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "is truncated"),
        (b"\xff\xd8\xff", "is truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(SampleError, match=message):
            read_image(str(path))
    damaged = bytearray(FORMATS["png"])
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(SampleError, match="cannot be decoded"):
        read_image(str(path))
    with pytest.raises(SampleError, match="cannot be read: Is a directory"):
        read_image(str(tmp_path))


def test_gray_alpha_deep_and_rotated_images(tmp_path: Path) -> None:
    path = str(tmp_path / "image.png")
    Image.fromarray(PIXELS[..., 0]).save(path)
    np.testing.assert_array_equal(read_image(path), np.repeat(PIXELS[..., :1], 3, axis=2))
    Image.fromarray(np.dstack([PIXELS, np.full(PIXELS.shape[:2], 7, np.uint8)])).save(path)
    np.testing.assert_array_equal(read_image(path), PIXELS)
    cv2.imwrite(path, PIXELS[..., ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = np.rot90(PIXELS, -1)
    Image.fromarray(PIXELS).save(path := str(tmp_path / "image.jpg"), exif=exif, quality=95)
    assert read_image(path).shape == upright.shape
    for lossless, options in (("image.webp", {"lossless": True}), ("image.tif", {}), ("image.png", {})):
        Image.fromarray(PIXELS).save(path := str(tmp_path / lossless), exif=exif, **options)
        np.testing.assert_array_equal(read_image(path), upright)


LABEL = RNG.integers(0, 21, (10, 14), dtype=np.uint8)


def test_gray_palette_and_deep_labels(tmp_path: Path) -> None:
    path = str(tmp_path / "label.png")
    Image.fromarray(LABEL).save(path)
    np.testing.assert_array_equal(read_label(path), LABEL)
    image = Image.fromarray(LABEL)
    image.putpalette([(i * 91) % 256 for i in range(768)])
    for bits in (8, 5):  # Pillow packs 21 colours into 8 bits, 16 into 4
        image.save(path, bits=bits)
        np.testing.assert_array_equal(read_label(path), LABEL)
    few = LABEL % 4
    image = Image.fromarray(few)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(path, bits=2)
    np.testing.assert_array_equal(read_label(path), few)
    cv2.imwrite(path, LABEL.astype(np.uint16) + 300)
    assert read_label(path).dtype == np.uint16
    np.testing.assert_array_equal(read_label(path), LABEL.astype(int) + 300)
    Image.fromarray(LABEL).save(path := str(tmp_path / "label.tif"))
    np.testing.assert_array_equal(read_label(path), LABEL)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "palette", "1 bit", "tiff"])
def test_labels_are_turned_as_their_images_are(tmp_path: Path, kind: str, orientation: int) -> None:
    """Where a program copies the photograph's EXIF into the label map; Detectron2 turns both, too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    label = LABEL % 2 if kind == "1 bit" else LABEL
    image = Image.fromarray(label.astype({"16 bits": np.uint16, "1 bit": bool}.get(kind, np.uint8)))
    if kind == "palette":
        image.putpalette([(i * 91) % 256 for i in range(768)])
    path = str(tmp_path / ("label.tif" if kind == "tiff" else "label.png"))
    image.save(path, exif=exif)
    np.testing.assert_array_equal(read_label(path), np.rot90(label, {3: 2, 6: -1}[orientation]))
    Image.fromarray(PIXELS[:10, :14]).save(photograph := str(tmp_path / "photograph.png"), exif=exif)
    assert read_image(photograph).shape[:2] == read_label(path).shape


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}</rdf:RDF></x:xmpmeta>'
)
ATTRIBUTE = XMP.format('tiff:Orientation="{}"/>')
ELEMENT = XMP.format("><tiff:Orientation>{}</tiff:Orientation></rdf:Description>")


def _with_orientations(path: Path, image: Image.Image, xmp: str, exif: int | None = None) -> str:
    """Writes an image with an XMP packet, and with EXIF where an orientation is given for it."""
    options: dict = {"xmp": xmp.encode(), "quality": 95}
    if path.suffix != ".webp":
        options = {"pnginfo": PngImagePlugin.PngInfo(), "quality": 95}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    if exif is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    image.save(path, **options)
    if path.suffix == ".jpg":
        data, segment = path.read_bytes(), b"http://ns.adobe.com/xap/1.0/\0" + xmp.encode()
        path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:])
    return str(path)


def test_xmp_may_come_after_the_pixels_of_png(tmp_path: Path) -> None:
    """As exiftool puts it there."""
    path = tmp_path / "image.png"
    _with_orientations(path, Image.fromarray(PIXELS), ATTRIBUTE.format(6))
    data = path.read_bytes()
    start = data.index(b"iTXt") - 4
    end = start + 12 + struct.unpack_from(">I", data, start)[0]
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])  # IEND is the last
    np.testing.assert_array_equal(read_image(str(path)), np.rot90(PIXELS, -1))
    np.testing.assert_array_equal(detection_utils.read_image(str(path), "RGB"), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("packet", [ATTRIBUTE, ELEMENT])
def test_images_whose_orientation_is_in_xmp_are_turned(tmp_path: Path, suffix: str, packet: str) -> None:
    """By Pillow and Detectron2, and not by OpenCV."""
    for orientation in range(10):  # 0 and 9 are none
        path = _with_orientations(
            tmp_path / f"image.{suffix}", Image.fromarray(PIXELS), packet.format(orientation)
        )
        expected = detection_utils.read_image(path, "RGB")
        assert (
            expected.shape == (PIXELS if orientation in (0, 1, 2, 3, 4, 9) else PIXELS.swapaxes(0, 1)).shape
        )
        for image_format, channels in (("RGB", slice(None)), ("BGR", slice(None, None, -1))):
            found = read_image(path, image_format)[..., channels]
            # Other decoders round JPEG colours differently.
            np.testing.assert_allclose(found, expected.astype(int), atol=0 if suffix == "png" else 4)
            assert read_image(path).flags.writeable or suffix == "webp"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_comes_before_xmp(tmp_path: Path, suffix: str) -> None:
    """Where a program turned the image and told so in one of them alone."""
    for exif, upright in ((1, PIXELS), (3, PIXELS[::-1, ::-1])):
        path = _with_orientations(
            tmp_path / f"image.{suffix}", Image.fromarray(PIXELS), ATTRIBUTE.format(6), exif
        )
        np.testing.assert_array_equal(read_image(path).shape, detection_utils.read_image(path, "RGB").shape)
        np.testing.assert_allclose(read_image(path), upright.astype(int), atol=0 if suffix == "png" else 40)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_whose_orientation_is_in_xmp_are_turned(tmp_path: Path, dtype: type) -> None:
    label = Image.fromarray(LABEL.astype(dtype))
    path = _with_orientations(tmp_path / "label.png", label, ATTRIBUTE.format(6))
    np.testing.assert_array_equal(read_label(path), np.rot90(LABEL, -1))
    assert read_label(path).dtype == dtype


def test_one_bit_masks_are_zero_and_one(tmp_path: Path) -> None:
    path = str(tmp_path / "label.png")
    Image.fromarray(LABEL > 9).save(path)
    np.testing.assert_array_equal(read_label(path), (LABEL > 9).astype(np.uint8))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_labels_of_few_bits(tmp_path: Path, bits: int) -> None:
    """Written by hand: neither Pillow nor OpenCV writes gray PNG files of 2 or 4 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    label = LABEL % 2**bits
    height, width = label.shape
    samples = np.unpackbits(label[..., None], axis=2)[..., 8 - bits :]  # the lowest bits, highest first
    rows = np.packbits(samples.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "label.png").write_bytes(png)
    np.testing.assert_array_equal(read_label(str(tmp_path / "label.png")), label)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_coloured_labels_are_refused(tmp_path: Path, channels: int) -> None:
    path = str(tmp_path / "label.png")
    Image.fromarray(np.repeat(LABEL[..., None], channels, axis=2)).save(path)
    with pytest.raises(SampleError, match=rf"label map '.*label\.png' has {channels} channels"):
        read_label(path)


def test_lossy_float_and_damaged_labels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(LABEL).save(jpg := str(tmp_path / "label.jpg"))
    with pytest.raises(SampleError, match="is a JPEG file, which alters labels"):
        read_label(jpg)
    tif = str(tmp_path / "label.tif")
    Image.fromarray(LABEL).save(tif, compression="jpeg")
    assert not np.array_equal(Image.open(tif), LABEL)
    with pytest.raises(SampleError, match=r"label\.tif' is compressed as JPEG or WebP, which alters labels"):
        read_label(tif)
    assert read_image(tif).shape == (*LABEL.shape, 3)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        Image.fromarray(LABEL).save(tif, compression=compression)
        np.testing.assert_array_equal(read_label(tif), LABEL)
    Image.fromarray(LABEL.astype(np.float32)).save(tif)
    with pytest.raises(SampleError, match="holds float32 values"):
        read_label(tif)
    Image.fromarray(LABEL).save(png := tmp_path / "label.png")
    png.write_bytes(png.read_bytes()[:-13])
    with pytest.raises(SampleError, match=r"label map .* is truncated"):
        read_label(str(png))


def test_headers_that_lie(tmp_path: Path) -> None:
    """Chunk lengths beyond the file, and a PNG file that begins with another chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "image.png"
    for body in (chunk(b"IEND", b""), struct.pack(">I", 0xFFFFFFFF) + b"IHDR"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        for read in (read_image, read_label):
            with pytest.raises(SampleError, match="is truncated"):
                read(str(path))
