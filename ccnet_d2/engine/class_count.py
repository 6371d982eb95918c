"""Whether a run's model has as many classes as the data it is trained on."""

from omegaconf import DictConfig, OmegaConf

from ccnet_d2.data.catalog import classes_of
from ccnet_d2.errors import UserError

__all__ = ["check_class_count"]


def check_class_count(cfg: DictConfig) -> None:
    """Before the first step: one class too few is a failed assertion within a kernel on a GPU, and one too many is
    noticed by the evaluation only.

    Runs whose mapper names no data set (`dataloader.train.mapper.dataset_names`), or whose head no number of classes,
    are not looked at.

    Raises:
        UserError: model and training set differ in their number of classes.
    """
    names = OmegaConf.select(cfg, "dataloader.train.mapper.dataset_names")
    count = OmegaConf.select(cfg, "model.sem_seg_head.num_classes")
    if names is None or count is None:
        return
    classes, _ = classes_of(names)
    if count != len(classes):
        raise UserError(
            f"model.sem_seg_head.num_classes is {count}, but the training set {names!r} has {len(classes)} classes."
        )
