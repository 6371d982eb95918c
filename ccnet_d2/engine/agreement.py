"""Whether what a run says about its model fits what it says about its data."""

import logging
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from ccnet_d2.data.catalog import check_registered, classes_of
from ccnet_d2.data.sem_seg_mapper import IGNORE_LABEL
from ccnet_d2.errors import UserError

__all__ = [
    "check_agreement",
    "check_channel_order",
    "check_class_count",
    "check_data_set_names",
    "check_instance_classes",
    "check_test_classes",
    "check_void",
    "warn_of_other_names",
]

logger = logging.getLogger(__name__)

_INSTANCE_CLASSES = ("model.roi_heads.num_classes", "model.num_classes")
"""Where Detectron2's models have the number of classes of instances; all others in their runs follow it."""

_VOID = ("model.sem_seg_head.ignore_value", "model.ignore_value")


def check_agreement(cfg: DictConfig) -> None:
    """Compare the number of classes, the label of void and the order of the channels, before the first step.

    One class too few is a failed assertion within a kernel on a GPU; one too many is noticed by the evaluation only.
    The label of void that a data set's files have is not the one that mappers give: the loss would leave out a class,
    or meet void as a label that is none.
    Channels in another order train and evaluate without a word, and `Predictor`, which asks the model for the order,
    then gives it other images.

    Runs whose training mapper names no data set (`dataloader.train.mapper.dataset_names`), such as Detectron2's, are
    not looked at, and what is not said is not compared.

    Raises:
        UserError: model and data differ.
    """
    names = OmegaConf.select(cfg, "dataloader.train.mapper.dataset_names")
    if names is None:
        return
    count = OmegaConf.select(cfg, "model.sem_seg_head.num_classes")
    classes, _ = classes_of(names)
    check_class_count("model.sem_seg_head.num_classes", count, "training", names, classes)
    for key in _VOID:
        check_void(OmegaConf.select(cfg, key), key)
    for split in ("train", "test"):
        check_channel_order(cfg, split)


def check_class_count(
    key: str, count: int | None, kind: str, names: str | Sequence[str], classes: Sequence[str]
) -> None:
    """Compare a model's number of classes with those of data sets.

    Args:
        key: of the number in the config.
        count: its value; None where it does not say.
        kind: of the data sets, "training" or "test".
        names: of them.
        classes: that they have.

    Raises:
        UserError: they differ.
    """
    if count is not None and count != len(classes):
        raise UserError(f"{key} is {count}, but the {kind} set {names!r} has {len(classes)} classes.")


def check_void(label: int | None, key: str) -> None:
    """Compare the label that a model takes for void with that of this package's mappers.

    Args:
        label: the value of the config; None where it does not say.
        key: its name there.

    Raises:
        UserError: they differ.
    """
    if label is not None and label != IGNORE_LABEL:
        raise UserError(
            f"{key} is {label}, but void is {IGNORE_LABEL} in what the mappers give, whatever it is in the files: "
            f"leave it at {IGNORE_LABEL}, and register the data set with the ignore_label of its files."
        )


def check_data_set_names(cfg: DictConfig, split: str) -> None:
    """See that there are data sets of the names in the run, for which Detectron2's loaders list all that there are.

    Args:
        cfg: a run.
        split: whose data sets, "train" or "test".

    Raises:
        DatasetError: there is none of such a name, or no name.
    """
    dataset = OmegaConf.select(cfg, f"dataloader.{split}.dataset")
    if isinstance(dataset, DictConfig) and "names" in dataset:
        check_registered(dataset.names)


def check_instance_classes(cfg: DictConfig) -> None:
    """Compare the number of classes of instances, once the training set is loaded: only then are those of a COCO file
    of one's own known.

    With one class too few the last trains as background; with one too many Detectron2's evaluator fails on the first
    answer of a class that is not there.

    Raises:
        UserError: model and data differ.
    """
    _compare_instance_classes(cfg, "train")


def check_test_classes(cfg: DictConfig) -> None:
    """Compare the classes of the test set, once it is loaded, with the model's number of them.

    Detectron2's evaluator of instances takes the model's first class for the test set's first one, whatever they are.
    Classes of other names than those of the training set are logged.

    Raises:
        UserError: model and data differ.
    """
    _compare_instance_classes(cfg, "test")
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    count = OmegaConf.select(cfg, "model.sem_seg_head.num_classes")
    if not names or OmegaConf.select(cfg, "dataloader.train.mapper.dataset_names") is None:
        return
    classes, _ = classes_of(names)
    check_class_count("model.sem_seg_head.num_classes", count, "test", names, classes)
    warn_of_other_names(OmegaConf.select(cfg, "dataloader.train.dataset.names"), names, "stuff_classes")


def _compare_instance_classes(cfg: DictConfig, split: str) -> None:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
    classes = _metadata(names, "thing_classes")
    if classes is None:
        return
    counts = {key: OmegaConf.select(cfg, key) for key in _INSTANCE_CLASSES}
    for key, count in counts.items():
        check_class_count(key, count, "training" if split == "train" else split, names, classes)
    if split == "test" and any(count is not None for count in counts.values()):
        warn_of_other_names(OmegaConf.select(cfg, "dataloader.train.dataset.names"), names, "thing_classes")


def warn_of_other_names(
    train: str | Sequence[str] | None, test: str | Sequence[str] | None, kind: str
) -> None:
    """Log the first class that has another name in the test set than in the training set.

    Args:
        train: names of the data sets to train on.
        test: of those to evaluate on.
        kind: "stuff_classes" or "thing_classes".
    """
    trained, tested = _metadata(train, kind), _metadata(test, kind)
    if not trained or not tested:
        return
    for index, (one, other) in enumerate(zip(trained, tested, strict=False)):
        if one != other:
            logger.warning(
                "Class %d is '%s' in the training set %r, but '%s' in the test set %r: the evaluation takes the one "
                "for the other.",
                *(index, one, train, other, test),
            )
            return


def _metadata(names: str | Sequence[str] | None, key: str) -> Sequence[str] | None:
    """What the first of several data sets says, whose classes their loaders have compared."""
    if not names:
        return None
    classes: Sequence[str] | None = MetadataCatalog.get(names if isinstance(names, str) else names[0]).get(
        key
    )
    return classes


def check_channel_order(cfg: DictConfig, split: str) -> None:
    """Compare the order of the channels that the model expects with that of the images it is given.

    Args:
        cfg: a run.
        split: whose images, "train" or "test".

    Raises:
        UserError: they differ.
    """
    wanted = OmegaConf.select(cfg, "model.input_format")
    key = f"dataloader.{split}.mapper.image_format"
    given = OmegaConf.select(cfg, key)
    if wanted is not None and given is not None and given != wanted:
        raise UserError(f"model.input_format is '{wanted}', but {key} is '{given}'.")
