"""Whether what a run says about its model fits what it says about its data."""

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from ccnet_d2.data.catalog import classes_of
from ccnet_d2.errors import UserError

__all__ = ["check_agreement", "check_channel_order", "check_instance_classes"]

_INSTANCE_CLASSES = ("model.roi_heads.num_classes", "model.num_classes")
"""Where Detectron2's models have the number of classes of instances; all others in their runs follow it."""


def check_agreement(cfg: DictConfig) -> None:
    """Compare the number of classes and the order of the channels, before the first step.

    One class too few is a failed assertion within a kernel on a GPU; one too many is noticed by the evaluation only.
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
    if count is not None and count != len(classes):
        raise UserError(
            f"model.sem_seg_head.num_classes is {count}, but the training set {names!r} has {len(classes)} classes."
        )
    for split in ("train", "test"):
        check_channel_order(cfg, split)


def check_instance_classes(cfg: DictConfig) -> None:
    """Compare the number of classes of instances, once the training set is loaded: only then are those of a COCO file
    of one's own known.

    With one class too few the last trains as background; with one too many Detectron2's evaluator fails on the first
    answer of a class that is not there.

    Raises:
        UserError: model and data differ.
    """
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names")
    if not names:
        return
    # Detectron2's loader has compared the classes of several sets.
    classes = MetadataCatalog.get(names if isinstance(names, str) else names[0]).get("thing_classes")
    for key in _INSTANCE_CLASSES:
        count = OmegaConf.select(cfg, key)
        if classes is not None and count is not None and count != len(classes):
            raise UserError(f"{key} is {count}, but the training set {names!r} has {len(classes)} classes.")


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
