import errno
import os
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageOps

from ccnet_d2.data.datasets.camvid import CAMVID_CLASSES
from ccnet_d2.data.image_files import read_image
from ccnet_d2.errors import UserError
from ccnet_d2.inference import (
    ClassTable,
    ImageFileError,
    colorize,
    difference,
    find_images,
    overlay,
    save_labels,
    save_prediction_grid,
    side_by_side,
    visualize,
    write_image,
)
from ccnet_d2.inference.batch import plan_pictures
from ccnet_d2.inference.classes import distinct_colors
from ccnet_d2.inference.drawing import (
    legend,
    panel_grid,
    readable,
    resize_labels,
    resize_rgb,
    scale_bar,
    text_line,
)
from ccnet_d2.inference.images import as_rgb
from ccnet_d2.inference.predictor import Prediction
from ccnet_d2.inference.video import VideoPainter
from ccnet_d2.inference.visualize import confidence_map, heat_colors

RED, GREEN, BLUE = (200, 0, 0), (0, 180, 0), (0, 0, 220)


@pytest.fixture
def classes():
    return ClassTable.create(["sky", "road", "car"], [RED, GREEN, BLUE], ignore_label=11)


def count(picture, color):
    return int((picture == np.array(color, np.uint8)).all(axis=-1).sum())


def test_labels_become_class_colours_and_the_rest_black(classes):
    labels = np.array([[0, 1, 2], [3, 11, 255]], np.uint8)
    expected = np.array([[RED, GREEN, BLUE], [(0, 0, 0)] * 3], np.uint8)
    assert np.array_equal(colorize(labels, classes), expected)
    assert np.array_equal(colorize(labels.astype(np.int64) - 12, classes), np.zeros((2, 3, 3), np.uint8))


def test_overlay_blends_and_draws_only_present_classes_in_the_legend(classes):
    image = np.full((300, 400, 3), 100, np.uint8)
    labels = np.zeros((300, 400), np.uint8)
    labels[:, 200:] = 1
    plain = overlay(image, labels, classes, outlines=False, with_legend=False)
    assert plain.shape == image.shape
    assert count(plain, (150, 50, 50)) == count(plain, (50, 140, 50)) == 300 * 200
    assert (
        count(overlay(image, labels, classes, outlines=True, with_legend=False), (150, 50, 50)) == 300 * 199
    )
    full = overlay(image, labels, classes, outlines=False)
    below = full[300:]
    assert np.array_equal(full[:300], plain)
    assert count(below, RED) > 50 and count(below, GREEN) > 50
    assert count(below, BLUE) == 0


@pytest.mark.parametrize(("size", "factor"), [((48, 48), 5), ((360, 480), 1), ((1, 1), 240), ((100, 30), 3)])
def test_tiny_pictures_are_enlarged_by_whole_pixels(classes, size, factor):
    assert readable(size) == factor
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, size, dtype=np.uint8)
    picture = overlay(image, labels, classes, alpha=0, outlines=False, with_legend=False)
    assert np.array_equal(picture, image.repeat(factor, axis=0).repeat(factor, axis=1))
    with_legend = overlay(image, labels, classes)
    assert with_legend.shape[1] == max(size[1] * factor, 240)


def test_the_legend_of_a_narrow_picture_can_be_read(classes):
    labels = np.zeros((300, 5), np.uint8)
    picture = overlay(np.full((300, 5, 3), 120, np.uint8), labels, classes)
    expected = legend(classes, [0], 240, size=13, notes=["100 %"])
    np.testing.assert_array_equal(picture[300:], expected)
    assert (picture[:300, :100] == 255).all()  # the picture stands in the middle of paper

    paint = VideoPainter()
    many = ClassTable.numbered(150)
    frames = [
        Prediction(np.zeros((300, 20, 3), np.uint8), np.full((300, 20), k, np.uint8), None, many)
        for k in (1, 9)
    ]
    assert {paint(frame).shape for frame in frames} == {paint(frames[0]).shape}
    np.testing.assert_array_equal(paint(frames[1])[300:321], legend(many, [9], 240, size=13)[:21])


def test_the_titles_of_narrow_panels_can_be_read():
    """As wide as a person of LIP, they were cut off before the number that they are there for."""
    panel, titles = np.zeros((300, 60, 3), np.uint8), ["pixel (5, 30)", "R = 1 (max 0.54 %)"]
    grid = panel_grid([[panel, panel]], titles)
    wide = text_line(titles[1], 400, 13)

    def extent(picture):
        return np.ptp(np.flatnonzero((picture < 128).any(axis=(0, 2))))

    column = (grid.shape[1] - 3 * 8) // 2
    assert extent(wide) + 4 <= column <= extent(wide) + 12
    for start in (8, 16 + column):
        black = np.flatnonzero((grid[21:321, start : start + column] == 0).all(axis=(0, 2)))
        assert (
            len(black) == 60 and abs(black.min() + black.max() + 1 - column) <= 1
        )  # as it was, in the middle
    assert extent(grid[:21, 16 + column :]) == pytest.approx(extent(wide), abs=1)
    # Those that are longer than a picture is wide are shortened.
    assert panel_grid([[panel, panel]], ["image", "a run of a long name " * 4]).shape[1] == 2 * 240 + 3 * 8


def test_the_ends_of_a_narrow_scale_can_be_read():
    colors = np.full((20, 3), 200, np.uint8)
    wide, narrow = (scale_bar(colors, "none", "most in the map", "share", width) for width in (400, 62))
    bar, other = (picture[:21][(picture[:21] < 128).any(axis=2)] for picture in (wide, narrow))
    assert len(bar) == len(other) > 200  # as much ink
    caption = scale_bar(colors, "0", "1", "share of attention, its square root as colour", 62)
    np.testing.assert_array_equal(
        caption,
        scale_bar(colors, "0", "1", "share of attention, its square root as colour", caption.shape[1]),
    )
    assert caption.shape[1] > 240


def test_difference_tells_right_wrong_and_not_labelled_apart(classes):
    prediction = np.array([[0, 1, 2, 0, 1]], np.uint8)
    truth = np.array([[0, 2, 2, 11, 255]], np.int32)
    picture = difference(prediction, truth, classes)
    right, wrong = picture[0, 0], picture[0, 1]
    assert np.array_equal(picture[0, 2], right)
    assert right.min() == right.max() > 200
    assert wrong[0] > 180 > 80 > wrong[1]
    assert picture[0, 3].max() < 70 and np.array_equal(picture[0, 3], picture[0, 4])


def test_comparison_has_a_panel_for_each_thing_known(classes):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    prediction, truth = np.zeros((240, 320), np.uint8), np.zeros((240, 320), np.uint8)
    truth[:, 160:] = 2
    without = side_by_side(image, prediction, classes)
    with_truth = side_by_side(image, prediction, classes, truth)
    assert with_truth.shape[1] - without.shape[1] == 2 * (320 + 8)
    assert count(without, RED) >= 240 * 320 and count(without, BLUE) == 0
    assert count(with_truth, RED) >= 240 * 480 and count(with_truth, BLUE) >= 240 * 160
    # The image itself is there, pixel for pixel.
    rows, columns = np.where((without == image[0, 0]).all(axis=2))
    assert any(
        np.array_equal(without[y : y + 240, x : x + 320], image) for y, x in zip(rows, columns, strict=True)
    )


def test_grids_compare_models_row_by_row(tmp_path, classes):
    images = [np.full((48, 48, 3), shade, np.uint8) for shade in (60, 120, 180)]
    truths = [np.full((48, 48), 1, np.uint8)] * 3
    models = {"R = 1": [np.zeros((48, 48), np.uint8)] * 3, "R = 2": truths}
    save_prediction_grid(tmp_path / "grid.png", images, models, classes, truths, row_titles=["a", "b", "c"])
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    cell = 240 * 240
    assert count(picture, RED) in range(3 * cell, 3 * cell + 400)  # three panels and a swatch
    assert count(picture, GREEN) in range(6 * cell, 6 * cell + 400)
    assert all(count(picture, (shade,) * 3) >= cell for shade in (60, 120, 180))

    save_prediction_grid(tmp_path / "one.png", images, truths, classes)
    single = np.asarray(Image.open(tmp_path / "one.png"))
    assert count(single, GREEN) in range(3 * cell, 3 * cell + 400)


def test_numbers_beside_the_pictures(tmp_path, classes, monkeypatch):
    """What is written, taken before it is drawn: pixel accuracies over all images, and shares of classes."""
    written = {}

    def noting(function):
        def noted(*args, **kwargs):
            written[function.__name__] = args, kwargs
            return function(*args, **kwargs)

        return noted

    for function in (panel_grid, legend):
        monkeypatch.setattr(visualize, function.__name__, noting(function))
    shapes = [(4, 5), (10, 10)]
    images = [np.zeros((*shape, 3), np.uint8) for shape in shapes]
    zeros = [np.zeros(shape, np.uint8) for shape in shapes]
    truths = [labels.copy() for labels in zeros]
    truths[0][0, :4] = 1  # wrong
    # Nobody can be right or wrong on pixels of the ignored label and of no class.
    truths[1][:3] = classes.ignore_label
    truths[1][3] = len(classes)
    models = {"R = 1": zeros, "R = 2": truths}
    save_prediction_grid(tmp_path / "a.png", images, models, classes, truths, row_titles=["x", "y"])
    (_, titles), options = written["panel_grid"]
    assert titles == ["image", "ground truth", "R = 1 (95.0 % right)", "R = 2 (100.0 % right)"]  # 76 of 80
    assert options == {"row_titles": ["x", "y"]}
    labels = np.array([[2] * 400 + [0] * 599 + [1]], np.uint8)
    overlay(np.zeros((1, 1000, 3), np.uint8), labels, classes)
    (_, present, _), options = written["legend"]
    assert present == [0, 2, 1] and options["notes"] == ["60 %", "40 %", "<1 %"]


def test_grids_of_images_of_different_sizes(tmp_path, classes):
    images = [np.full((300, 400, 3), 60, np.uint8), np.full((200, 100, 3), 120, np.uint8)]
    labels = [np.zeros(image.shape[:2], np.uint8) for image in images]
    save_prediction_grid(tmp_path / "grid.jpg", images, labels, classes, labels)
    assert Image.open(tmp_path / "grid.jpg").size[0] == 4 * 400 + 3 * 8 + 2 * 8


def test_large_panels_are_reduced(classes):
    image = np.full((2000, 4000, 3), 50, np.uint8)
    assert side_by_side(image, np.zeros((2000, 4000), np.uint8), classes).shape[1] == 2 * 720 + 8 + 2 * 8


def test_grids_refuse_what_does_not_fit(tmp_path, classes):
    image, labels = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
    path = tmp_path / "grid.png"
    with pytest.raises(ValueError, match="2 entries in 'prediction' for 1 images"):
        save_prediction_grid(path, [image], [labels, labels], classes)
    with pytest.raises(ValueError, match="1 entries in 'ground truth' for 2 images"):
        save_prediction_grid(path, [image] * 2, [labels] * 2, classes, [labels])
    with pytest.raises(ValueError, match="at least one image"):
        save_prediction_grid(path, [], [], classes)
    with pytest.raises(ValueError, match="differ in size"):
        save_prediction_grid(path, [image], [np.zeros((4, 5), np.uint8)], classes)
    with pytest.raises(ValueError, match="differ in size"):
        overlay(image, np.zeros((5, 4), np.uint8), classes)
    assert not path.exists()


def test_legend_names_every_class_and_void(classes):
    assert legend(classes, [], 300).shape == (0, 300, 3)
    three = legend(classes, [0, 1, 2, 3], 300)
    for color in (RED, GREEN, BLUE, (0, 0, 0)):
        assert count(three, color) > 50
    many = ClassTable.numbered(150)
    assert legend(many, list(range(150)), 500).shape[0] > legend(many, list(range(20)), 500).shape[0]


def test_text_is_shortened_to_its_width():
    short, long = text_line("abc", 100), text_line("abc " * 100, 100)
    assert short.shape == long.shape == (22, 100, 3)
    assert (long < 200).any() and not np.array_equal(short, long)
    assert (text_line("x" * 50, 6) == 255).mean() > 0.5


def test_resizes():
    labels = np.array([[0, 1], [2, 300]], np.int16)
    assert np.array_equal(resize_labels(labels, 4, 6), labels.repeat(2, axis=0).repeat(3, axis=1))
    assert np.array_equal(resize_labels(resize_labels(labels, 6, 6), 2, 2), labels)
    image = np.zeros((4, 4, 3), np.uint8)
    image[::2] = 100
    assert np.array_equal(resize_rgb(image, 2, 2), np.full((2, 2, 3), 50, np.uint8))


def test_empty_cells_and_uneven_panels():
    grid = panel_grid(
        [[np.zeros((300, 300, 3), np.uint8), None], [np.zeros((150, 300, 3), np.uint8)]], ["a", "b"]
    )
    assert grid.shape[1] == 2 * 300 + 8 + 16
    assert count(grid, (0, 0, 0)) >= 300 * 300 + 150 * 300


def test_heat_is_brighter_for_more():
    colors = heat_colors(np.linspace(-0.5, 1.5, 101)).astype(int)
    brightness = colors @ np.array([299, 587, 114])
    assert (np.diff(brightness) >= 0).all() and brightness[0] < 2000 and brightness[-1] > 240_000
    assert np.array_equal(confidence_map(np.array([[1.0]])), heat_colors(np.array([[1.0]])))


def test_distinct_colors_are_distinct():
    colors = distinct_colors(150)
    assert len(set(colors)) == 150
    assert all(0 <= channel <= 255 for color in colors for channel in color)


@pytest.mark.parametrize("names", ["camvid_sem_seg_val", ["camvid_sem_seg_val", "voc12_sem_seg_val"]])
def test_the_classes_of_a_run_are_those_of_its_first_test_set(names):
    table = ClassTable.from_run(OmegaConf.create({"dataloader": {"test": {"dataset": {"names": names}}}}))
    assert table.names == CAMVID_CLASSES and table.ignore_label == 11
    for run in ({}, {"dataloader": {"test": {"dataset": {"names": []}}}}):
        assert ClassTable.from_run(OmegaConf.create(run)) is None


def test_class_tables():
    class Metadata:
        name = "set"
        stuff_classes = ("a", "b")
        stuff_colors = ((1, 2, 3), (4, 5, 6))
        ignore_label = 7

    table = ClassTable.from_metadata(Metadata)
    assert (
        table.names == ("a", "b")
        and table.ignore_label == 7
        and table.colors.tolist() == [[1, 2, 3], [4, 5, 6]]
    )
    del Metadata.stuff_colors, Metadata.ignore_label
    assert ClassTable.from_metadata(Metadata).ignore_label == 255
    with pytest.raises(ValueError, match="1 colours for 2 classes"):
        ClassTable.create(["a", "b"], [(0, 0, 0)])
    del Metadata.stuff_classes
    with pytest.raises(ValueError, match="data set 'set' has no 'stuff_classes'"):
        ClassTable.from_metadata(Metadata)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_label_maps_come_back_as_written(tmp_path, dtype):
    labels = np.array([[0, 1], [7, 254 if dtype is np.uint8 else 400]], dtype)
    save_labels(tmp_path / "labels.png", labels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "labels.png")), labels)
    with pytest.raises(ValueError, match=r"label maps are written as .png"):
        save_labels(tmp_path / "labels.jpg", labels)
    assert os.listdir(tmp_path) == ["labels.png"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    image = np.zeros((8, 8, 3), np.uint8)
    write_image(path, image)
    before = path.read_bytes()

    def disk_full(self, target, **_):
        with open(target, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(ImageFileError, match=r"cannot write '.*picture.png': No space left on device"):
        write_image(path, image + 1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["picture.png"]


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageFileError, match=r"cannot write '.*file/picture.png'"):
        write_image(tmp_path / "file" / "picture.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ImageFileError, match=r"unknown image type '.xyz', take .png or .jpg"):
        write_image(tmp_path / "picture.xyz", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ImageFileError, match=r"cannot write '.*long\.webp': .*limit of 16383 pixels\.$"):
        write_image(tmp_path / "long.webp", np.zeros((17000, 1, 3), np.uint8))


def test_finding_images(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d[1].png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()

    def names(*inputs):
        return [str(path.relative_to(tmp_path)) for path in find_images(inputs)]

    assert names(tmp_path) == ["a.JPG", "b.png", "d[1].png"]
    assert names(tmp_path / "b.png", tmp_path) == ["b.png", "a.JPG", "d[1].png"]
    assert names(str(tmp_path / "*.png")) == ["b.png", "d[1].png"]
    assert names(str(tmp_path / "**" / "*.png")) == ["b.png", "d[1].png", "sub/c.png"]
    assert names(tmp_path / "d[1].png") == ["d[1].png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images("~/b.png") == [tmp_path / "b.png"]
    for missing, message in (
        (tmp_path / "x.png", "image '.*x.png' does not exist"),
        (str(tmp_path / "*.gif"), "pattern '.*' matches no image"),
    ):
        with pytest.raises(ImageFileError, match=message):
            find_images([missing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageFileError, match=r"folder '.*empty' holds no image"):
        find_images(tmp_path / "empty")
    with pytest.raises(ImageFileError, match="no image given"):
        find_images([])


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    """As of a shell's variable that is not set; the pictures of all images there were written."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    with pytest.raises(
        ImageFileError, match=r"^an image has an empty name: name a file, a folder or a pattern\.$"
    ):
        find_images(["a.png", ""])
    with pytest.raises(UserError, match=r"^the ground truth has no name: give a folder\.$"):
        plan_pictures("a.png", "out/", picture="side-by-side", ground_truth="")
    assert find_images(".") == [Path("a.png")]


def test_what_cannot_be_looked_up_is_one_sentence(tmp_path, monkeypatch):
    """Names quoted together are one name, longer than any file's; folders may be another user's."""
    with pytest.raises(ImageFileError, match=r"(cannot be looked up: File name too long|does not exist)\.$"):
        find_images("street.png " * 30)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(ImageFileError, match=rf"^'{tmp_path}' cannot be looked up: Permission denied\.$"):
        find_images(tmp_path)


def test_names_as_long_as_they_can_be(tmp_path):
    write_image(tmp_path / f"{'a' * 251}.png", np.zeros((2, 2, 3), np.uint8))
    assert os.listdir(tmp_path) == [f"{'a' * 251}.png"]
    with pytest.raises(ImageFileError, match=r"a\.png': File name too long\.$"):
        write_image(tmp_path / f"{'a' * 252}.png", np.zeros((2, 2, 3), np.uint8))
    assert len(os.listdir(tmp_path)) == 1


def test_arrays_and_pillow_images_become_rgb():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    for image in (grey, grey[:, :, None], expected, Image.fromarray(grey)):
        assert np.array_equal(as_rgb(image), expected)
    rgba = np.dstack([expected, np.full((2, 3), 9, np.uint8)])
    assert np.array_equal(as_rgb(rgba), expected)
    assert np.array_equal(as_rgb(Image.fromarray(rgba)), expected)
    palette = Image.fromarray(grey)
    palette.putpalette([10, 20, 30] * 256)
    assert np.array_equal(as_rgb(palette), np.broadcast_to(np.uint8([10, 20, 30]), (2, 3, 3)))
    with pytest.raises(ValueError, match=r"must be uint8 in 0..255, got float64"):
        as_rgb(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"got shape \(3, 2, 2, 1\)"):
        as_rgb(np.zeros((3, 2, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="not 8 bits per channel"):
        as_rgb(Image.new("I;16", (2, 2)))
    with pytest.raises(TypeError, match="got list"):
        as_rgb([1, 2])
    with pytest.raises(ValueError, match="an image must have pixels, got 0x3"):
        as_rgb(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_pillow_images_are_turned_as_their_files_are(tmp_path, orientation, suffix):
    array = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(array).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert np.array_equal(as_rgb(Image.open(path)), expected)
    assert np.array_equal(as_rgb(Image.open(path).convert("RGB")), expected)
    # Other decoders round JPEG colours differently.
    np.testing.assert_allclose(
        as_rgb(Image.open(path)), read_image(str(path)).astype(int), atol=4 * (suffix == "jpg")
    )


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_damaged_exif_does_not_keep_an_image_from_being_read(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.new("RGB", (16, 8)).save(path, exif=b"Exif\0\0damaged")
    assert as_rgb(Image.open(path)).shape == read_image(str(path)).shape == (8, 16, 3)
    # A text where a number is due, which Pillow reads and cannot write.
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.new("RGB", (16, 8)).save(path, exif=exif.tobytes().replace(b"\x01\x0f", b"\x01\x00"))
    assert as_rgb(Image.open(path)).shape == read_image(str(path)).shape == (16, 8, 3)
