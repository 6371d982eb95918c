"""Registration of two folders."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog

from ccnet_d2.data import DatasetError, classes_of, get_sem_seg_dataset_dicts, register_sem_seg_folder
from ccnet_d2.data.datasets.folder import default_colors

LABEL = np.zeros((4, 6), np.uint8)


def _register(root: Path, **kwargs) -> None:
    register_sem_seg_folder("mine", root / "images", root / "labels", ["a", "b"], **kwargs)


def test_pairs_by_name_in_order(tmp_path: Path, write_pair: Callable) -> None:
    pairs = {
        name: write_pair(name, LABEL, extension=ext)
        for name, ext in (("b", "JPG"), ("a", "png"), ("c/d", "png"))
    }
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "labels" / ".hidden.png").write_bytes(b"no label map")
    _register(tmp_path)
    samples = DatasetCatalog.get("mine")
    assert [(s["file_name"], s["sem_seg_file_name"]) for s in samples] == [
        pairs["a"],
        pairs["b"],
        pairs["c/d"],
    ]
    assert [s["image_id"] for s in samples] == ["a", "b", "c/d"]


def test_every_kind_of_image_file_is_found(tmp_path: Path) -> None:
    kinds = ("png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp", "JPEG", "Tif")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        for kind in (*kinds, "txt", "gif"):
            (tmp_path / folder / f"{kind}.{kind}").touch()  # nothing is read
    _register(tmp_path)
    assert [s["image_id"] for s in DatasetCatalog.get("mine")] == sorted(kinds)


def test_hidden_folders_and_links_back_are_passed_over(tmp_path: Path, write_pair: Callable) -> None:
    write_pair("street/a", LABEL)
    write_pair("b", LABEL)
    write_pair("elsewhere/c", LABEL)
    for kind in ("images", "labels"):
        folder = tmp_path / kind
        (folder / ".thumbnails").mkdir()
        shutil.copy(folder / "b.png", folder / ".thumbnails" / "b.png")
        # What the second of two same `ln -s` leaves; followed, it would hold every sample again, forty times.
        (folder / kind).symlink_to(folder)
        (folder / "street" / "up").symlink_to(folder)
        # A link to anywhere else is followed.
        (folder / "elsewhere").rename(tmp_path / f"{kind} elsewhere")
        (folder / "linked").symlink_to(tmp_path / f"{kind} elsewhere")
    _register(tmp_path)
    assert [s["image_id"] for s in DatasetCatalog.get("mine")] == ["b", "linked/c", "street/a"]


def test_folders_that_link_to_each_other_are_read_once_each_way(tmp_path: Path, write_pair: Callable) -> None:
    """They were followed until the system refused: a sample came back forty times."""
    write_pair("a/1", LABEL)
    write_pair("b/2", LABEL)
    for kind in ("images", "labels"):
        (tmp_path / kind / "a/to_b").symlink_to(tmp_path / kind / "b")
        (tmp_path / kind / "b/to_a").symlink_to(tmp_path / kind / "a")
    _register(tmp_path)
    assert [s["image_id"] for s in DatasetCatalog.get("mine")] == ["a/1", "a/to_b/2", "b/2", "b/to_a/1"]


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, write_pair: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1", "b/2"):
        write_pair(name, LABEL)
    scandir = os.scandir

    def without_rights(path: str) -> Iterator[os.DirEntry]:  # root has them whatever the mode of the folder
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_rights)
    _register(tmp_path)
    with pytest.raises(DatasetError, match=r"the folder '.*images/b' cannot be read: Permission denied\.$"):
        DatasetCatalog.get("mine")


def test_metadata(tmp_path: Path) -> None:
    _register(tmp_path, colors=[[1, 2, 3], [4, 5, 6]], ignore_label=7)
    metadata = MetadataCatalog.get("mine")
    assert metadata.stuff_classes == ["a", "b"]
    assert metadata.stuff_colors == [(1, 2, 3), (4, 5, 6)]
    assert metadata.ignore_label == 7
    assert metadata.image_root == str(tmp_path / "images")
    assert metadata.sem_seg_root == str(tmp_path / "labels")
    assert metadata.evaluator_type == "sem_seg"
    assert classes_of("mine") == (["a", "b"], 7)
    _register(tmp_path, colors=np.array([[0, 128.0, 255], [4, 5, 6]]))
    assert MetadataCatalog.get("mine").stuff_colors == [(0, 128, 255), (4, 5, 6)]
    _register(tmp_path)
    assert classes_of("mine") == (["a", "b"], 255)


def test_split_list_chooses_and_orders(tmp_path: Path, write_pair: Callable) -> None:
    for name in "abc":
        write_pair(name, LABEL)
    (tmp_path / "some.txt").write_text("c\n\na\n")
    _register(tmp_path, split_file=tmp_path / "some.txt")
    assert [s["image_id"] for s in DatasetCatalog.get("mine")] == ["c", "a"]
    for content, message in (
        ("a\nx\n", r"no image for 'x', which '.*some\.txt' names\.$"),
        ("", "is empty"),
        ("a\nb\na\n", "names 'a' twice"),
        (
            "a.png\nb.png\n",
            r"no image for 'a\.png', 'b\.png', which '.*' names: names in a list are without suffix, such as 'a'\.$",
        ),
    ):
        (tmp_path / "some.txt").write_text(content)
        with pytest.raises(DatasetError, match=message):
            DatasetCatalog.get("mine")
    # As Windows editors write it; without a last newline.
    for content in ("\ufeffc\r\na\r\n".encode(), b"c\na"):
        (tmp_path / "some.txt").write_bytes(content)
        assert [s["image_id"] for s in DatasetCatalog.get("mine")] == ["c", "a"]
    for content in ("ça\n".encode("latin-1"), "a\n".encode("utf-16")):
        (tmp_path / "some.txt").write_bytes(content)
        with pytest.raises(
            DatasetError, match=r"split list '.*some.txt' cannot be read: it is not UTF-8 text"
        ):
            DatasetCatalog.get("mine")
    (tmp_path / "some.txt").unlink()
    with pytest.raises(DatasetError, match=r"split list .*some.txt' does not exist\.$"):
        DatasetCatalog.get("mine")


def test_suffixes(tmp_path: Path, write_pair: Callable) -> None:
    image, _ = write_pair("x/one_leftImg8bit", LABEL)
    os.renames(
        tmp_path / "labels" / "x" / "one_leftImg8bit.png", tmp_path / "labels" / "x" / "one_gt_ids.png"
    )
    _register(tmp_path, image_suffix="_leftImg8bit.png", label_suffix="_labels.png")
    with pytest.raises(DatasetError, match=r"the label folder '.*labels' holds no _labels\.png files\.$"):
        DatasetCatalog.get("mine")
    (tmp_path / "labels" / "x" / "one_gt_color.png").write_bytes(b"ignored")
    _register(tmp_path, image_suffix="_leftImg8bit.png", label_suffix="_gt_ids.png")
    assert DatasetCatalog.get("mine") == [
        {
            "file_name": image,
            "sem_seg_file_name": str(tmp_path / "labels" / "x" / "one_gt_ids.png"),
            "image_id": "x/one",
        }
    ]


def test_missing_folders_and_pairs(tmp_path: Path, write_pair: Callable) -> None:
    _register(tmp_path, hint="Ask the librarian.")
    with pytest.raises(DatasetError, match=r"image folder '.*images' does not exist. Ask the librarian.$"):
        DatasetCatalog.get("mine")
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match=r"'.*images' holds no image files. Ask the librarian.$"):
        DatasetCatalog.get("mine")
    for name in "abcde":
        write_pair(name, LABEL)
    (tmp_path / "labels" / "c.png").unlink()
    with pytest.raises(DatasetError, match=r"'.*labels' has no label map for 'c', which '.*images' names"):
        DatasetCatalog.get("mine")
    write_pair("a.left", LABEL)  # not a name of the other file with a suffix
    (tmp_path / "labels" / "a.left.png").unlink()
    write_pair("c", LABEL)
    with pytest.raises(DatasetError, match=r"no label map for 'a\.left', which '.*images' names\.$"):
        DatasetCatalog.get("mine")
    for name in ("a.left", "a", "b", "d", "e"):
        (tmp_path / "images" / f"{name}.png").unlink()
    write_pair("c", LABEL)
    with pytest.raises(DatasetError, match=r"'.*images' has no image for 'a', 'b', 'd' and 1 more"):
        DatasetCatalog.get("mine")


def test_two_images_of_one_name(tmp_path: Path, write_pair: Callable) -> None:
    write_pair("a", LABEL)
    write_pair("a", LABEL, extension="jpg")
    _register(tmp_path)
    with pytest.raises(DatasetError, match="have the same name"):
        DatasetCatalog.get("mine")


def test_registering_again_replaces(tmp_path: Path, write_pair: Callable) -> None:
    write_pair("a", LABEL)
    _register(tmp_path / "elsewhere")
    _register(tmp_path)
    _register(tmp_path)
    assert len(DatasetCatalog.get("mine")) == 1
    assert MetadataCatalog.get("mine").image_root == str(tmp_path / "images")
    DatasetCatalog.register("theirs", list)
    with pytest.raises(DatasetError, match="'theirs' is already registered by another library"):
        register_sem_seg_folder("theirs", tmp_path, tmp_path, ["a"])


def test_bad_descriptions(tmp_path: Path) -> None:
    for kwargs, message in (
        ({"classes": []}, "at least one class"),
        ({"classes": "road"}, "classes is 'road', but a list of names is needed"),
        ({"classes": ["a", "a"]}, "same name"),
        *(
            (
                {"classes": ["a"], "colors": [color]},
                "the colour .* is not red, green and blue in whole numbers",
            )
            for color in (
                (0.5, 0.0, 1.0),
                (0, 0, 256),
                (-1, 0, 0),
                (1, 2),
                (0, 0, 0, 255),
                7,
                "red",
                (1, None, 2),
            )
        ),
        ({"classes": ["a", "b"], "colors": [(0, 0, 0)]}, "1 colours for 2 classes"),
        ({"classes": ["a"], "colors": [(0, 0, 0), (1, 1, 1)]}, "2 colours for 1 classes"),
        *(
            (
                {"classes": ["a"], "ignore_label": value},
                f"ignore_label is {value!r}, but a whole number is needed",
            )
            for value in (None, "255", 3.5)
        ),
        ({"classes": ["a", "b"], "ignore_label": 0}, "ignore_label 0 is class 'a'"),
        ({"classes": ["a", "b"], "ignore_label": 1}, "ignore_label 1 is class 'b'"),
    ):
        with pytest.raises(DatasetError, match=message):
            register_sem_seg_folder("mine", tmp_path, tmp_path, **kwargs)
    assert "mine" not in DatasetCatalog


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_pair: Callable) -> None:
    write_pair("a", LABEL)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("a\n")
    register_sem_seg_folder("mine", "~/images", "~/labels", ["a"], split_file="~/list.txt")
    assert DatasetCatalog.get("mine")[0]["file_name"] == str(tmp_path / "images" / "a.png")


def test_voc_colours() -> None:
    # From the development kit: aeroplane, bicycle, chair, train, tvmonitor.
    colors = default_colors(21)
    assert colors[0] == (0, 0, 0)
    assert [colors[i] for i in (1, 2, 9, 19, 20)] == [
        (128, 0, 0),
        (0, 128, 0),
        (192, 0, 0),
        (128, 192, 0),
        (0, 64, 128),
    ]
    assert len(set(default_colors(1000))) == 1000


def test_unknown_names_and_disagreeing_sets(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match="no data set 'camvid_sem_seg_trian'; did you mean 'camvid_sem_seg_train'"
    ):
        get_sem_seg_dataset_dicts("camvid_sem_seg_trian")
    with pytest.raises(DatasetError, match="No data set is named"):
        get_sem_seg_dataset_dicts([])
    _register(tmp_path)
    with pytest.raises(DatasetError, match="'mine' and 'camvid_sem_seg_train' differ"):
        classes_of(["mine", "camvid_sem_seg_train"])
    with pytest.raises(
        DatasetError, match=r"'voc_2007_train' has instances \(thing_classes\) and no stuff_classes"
    ):
        classes_of("voc_2007_train")
    pair = {"file_name": "a.png", "sem_seg_file_name": "b.png"}
    DatasetCatalog.register("one after the other", lambda: (dict(pair, image_id=i) for i in range(3)))
    assert [sample["image_id"] for sample in get_sem_seg_dataset_dicts("one after the other")] == [0, 1, 2]
    for name, record in (
        ("other keys", {"image": "a.png", "sem_seg_file_name": "b.png"}),
        ("pairs", ("a.png", "b.png")),
    ):
        DatasetCatalog.register(name, lambda record=record: [record])
        with pytest.raises(
            DatasetError, match=rf"^Data set '{name}': its loader has to give dicts with 'file_name' .*a\.png"
        ):
            get_sem_seg_dataset_dicts(name)
    DatasetCatalog.register("nothing", list)
    with pytest.raises(DatasetError, match="'nothing' is registered without stuff_classes"):
        classes_of("nothing")
    with pytest.raises(DatasetError, match=r"^Data set 'nothing' is empty\.$"):
        get_sem_seg_dataset_dicts(["nothing"])


FIVE_LINES = """
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from omegaconf import OmegaConf
from ccnet_d2.data import SemSegMapper, get_sem_seg_dataset_dicts
from ccnet_d2.data.transforms import RandomScaleCrop

{registration}

dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_sem_seg_dataset_dicts)(names="my_street_train"),
    mapper=L(SemSegMapper)(
        is_train=True,
        augmentations=[L(RandomScaleCrop)(crop_size=(16, 24), scale_range=(0.5, 2.0))],
        dataset_names="${{..dataset.names}}",
    ),
    total_batch_size=2,
    aspect_ratio_grouping=False,
)
"""


def _registration_in_readme() -> str:
    readme = Path(__file__).parents[3] / "projects" / "CCNet" / "datasets" / "README.md"
    section = readme.read_text(encoding="utf-8").partition("## Your own folders")[2]
    return section.partition("```python\n")[2].partition("```")[0]


def test_own_folders_from_a_lazy_config(
    tmp_path: Path, write_pair: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The five lines that the README shows, in a config file."""
    registration = _registration_in_readme()
    assert 0 < len(registration.strip().splitlines()) <= 5
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(3):
            write_pair(f"{split}/{index}", rng.integers(0, 3, (20, 30), dtype=np.uint8))
    (tmp_path / "my_street").mkdir()
    for kind in ("images", "labels"):
        os.rename(tmp_path / kind, tmp_path / "my_street" / kind)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "my_run.py"
    config.write_text(FIVE_LINES.format(registration=registration))
    for _ in range(2):  # a config file may be loaded twice in one process
        batch = next(iter(instantiate(LazyConfig.load(str(config)).dataloader.train)))
    assert len(batch) == 2
    assert batch[0]["image"].shape == (3, 16, 24) and batch[0]["sem_seg"].shape == (16, 24)
    assert set(batch[0]["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}
