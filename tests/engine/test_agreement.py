"""Every run that comes with the project agrees with itself, and disagreements are named."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf

from ccnet_d2.engine import apply_overrides
from ccnet_d2.engine.agreement import (
    check_agreement,
    check_data_set_names,
    check_instance_classes,
    check_test_classes,
)
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.glob("*/*.py")
    if path.parent.name not in ("common", "quick_schedules")
)


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_the_project(name, caplog):
    cfg = get_config(name)
    check_agreement(cfg)
    check_data_set_names(cfg, "train")
    check_data_set_names(cfg, "test")
    check_instance_classes(cfg)
    check_test_classes(cfg)
    assert not caplog.records


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.sem_seg_head.num_classes=21",
            r"num_classes is 21, but the training set 'camvid.*' has 11 classes",
        ),
        ("dataloader.train.dataset.names=lip_sem_seg_train", "'lip_sem_seg_train' has 20 classes"),
        # That of CamVid's files, and a class; a GPU's kernel would assert, or the class never be learnt.
        (
            "model.sem_seg_head.ignore_value=11",
            "ignore_value is 11, but void is 255 in what the mappers give",
        ),
        ("model.sem_seg_head.ignore_value=0", "ignore_value is 0, but void is 255 in what the mappers give"),
        ("model.ignore_value=11", "^model.ignore_value is 11, but void is 255 in what the mappers give"),
        ("model.input_format=BGR", "'BGR', but dataloader.train.mapper.image_format is 'RGB'"),
        (
            "dataloader.test.mapper.image_format=BGR",
            "'RGB', but dataloader.test.mapper.image_format is 'BGR'",
        ),
    ],
)
def test_disagreements(override, message):
    with pytest.raises(UserError, match=message):
        check_agreement(apply_overrides(get_config("camvid/ccnet_R_18_D8_half.py"), [override]))


@pytest.mark.parametrize("check", [check_test_classes, check_instance_classes])
def test_what_says_no_classes_is_not_compared(check):
    check(OmegaConf.create({"dataloader": {}, "model": {"num_classes": 5}}))
    data = {split: {"dataset": {"names": "a set that says nothing"}} for split in ("train", "test")}
    check(OmegaConf.create({"dataloader": data, "model": {"num_classes": 5}}))


def test_classes_of_the_test_set(caplog):
    """A detector of three classes on COCO: its first one would have counted as COCO's first one."""
    cfg = get_config("camvid/ccnet_R_18_D8_half.py")
    cfg.dataloader.test.dataset.names = "lip_sem_seg_val"
    message = "^model.sem_seg_head.num_classes is 11, but the test set 'lip_sem_seg_val' has 20 classes.$"
    with pytest.raises(UserError, match=message):
        check_test_classes(cfg)
    cfg = get_config("coco/mask_rcnn_R_50_FPN_1x.py")
    cfg.dataloader.test.dataset.names = ["cityscapes_fine_instance_seg_val"]
    with pytest.raises(
        UserError, match=r"^model.roi_heads.num_classes is 80, but the test set .* has 8 classes"
    ):
        check_test_classes(cfg)
    assert not caplog.records


@pytest.fixture
def other_classes():
    """A test set of as many classes as COCO, two of which changed places."""
    names = list(MetadataCatalog.get("coco_2017_val").thing_classes)
    names[1:3] = names[2], names[1]
    MetadataCatalog.get("other_classes").thing_classes = names
    yield "other_classes"
    MetadataCatalog.pop("other_classes")


def test_classes_of_other_names_in_the_test_set(other_classes, caplog):
    cfg = get_config("coco/mask_rcnn_R_50_FPN_1x.py")
    cfg.dataloader.test.dataset.names = other_classes
    check_test_classes(cfg)
    assert [record.getMessage() for record in caplog.records] == [
        "Class 1 is 'bicycle' in the training set 'coco_2017_train', but 'car' in the test set 'other_classes': the "
        "evaluation takes the one for the other."
    ]


@pytest.fixture
def sets_of_classes():
    """Registers data sets by their classes."""
    made = []

    def make(name, **classes):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(**classes)
        made.append(name)
        return name

    yield make
    for name in made:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def test_classes_of_other_names_in_label_maps(sets_of_classes, caplog):
    cfg = get_config("camvid/ccnet_R_18_D8_half.py")
    classes = MetadataCatalog.get("camvid_sem_seg_train").stuff_classes
    cfg.dataloader.test.dataset.names = sets_of_classes(
        "swapped", stuff_classes=[*classes[:9], *classes[:8:-1]]
    )
    check_test_classes(cfg)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"Class 9 is '{classes[9]}' in the training set 'camvid_sem_seg_train', but '{classes[10]}'"
    )


def test_test_sets_that_are_compared_with_nothing(sets_of_classes, caplog):
    """Such as one that says no names, and a model that says no number of classes."""
    cfg = get_config("coco/mask_rcnn_R_50_FPN_1x.py")
    cfg.dataloader.test.dataset.names = sets_of_classes("nameless")
    check_test_classes(cfg)
    cfg.dataloader.test.dataset.names = sets_of_classes("others", thing_classes=["boat"])
    del cfg.model.roi_heads["num_classes"]
    check_test_classes(cfg)
    assert not caplog.records


def test_of_several_data_sets_the_first_one_says_the_classes(sets_of_classes):
    cfg = get_config("coco/mask_rcnn_R_50_FPN_1x.py")
    names = [sets_of_classes("two", thing_classes=["a", "b"]), sets_of_classes("one", thing_classes=["a"])]
    cfg.dataloader.train.dataset.names = names
    with pytest.raises(UserError, match=r"num_classes is 80, but the training set .* has 2 classes"):
        check_instance_classes(cfg)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("coco_2017_vall", "There is no data set 'coco_2017_vall'; did you mean 'coco_2017_val'"),
        (["coco_2017_val", "?"], r"There is no data set '\?'; register it first"),
        (5, "There is no data set '5'; register it first"),
        (["coco_2017_val", 5], "There is no data set '5'; register it first"),
        (None, "No data set is named"),
        ([], "No data set is named"),
    ],
)
def test_data_sets_that_are_not_there(split, names, message):
    """Detectron2's loaders say so in a KeyError with the names of all that there are."""
    cfg = get_config("coco/mask_rcnn_R_50_FPN_1x.py")
    cfg.dataloader[split].dataset.names = names
    with pytest.raises(UserError, match=f"^{message}"):
        check_data_set_names(cfg, split)
    check_data_set_names(OmegaConf.create({"dataloader": {split: {"dataset": None}}}), split)
