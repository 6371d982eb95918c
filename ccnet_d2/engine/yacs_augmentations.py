"""What the INPUT keys of a yacs config do with images."""

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ccnet_d2.choices import check_choice
from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomScaleCrop, ResizeToFit
from ccnet_d2.errors import UserError
from ccnet_d2.modeling.config import refuse_without_effect

__all__ = ["test_augmentations", "train_augmentations"]

_FLIPS = ("horizontal", "vertical", "none")


def train_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Those of INPUT.CROP, INPUT.CCNET and INPUT.RANDOM_FLIP.

    Raises:
        UserError: INPUT.CROP is not of the type "absolute", or it is off though INPUT.CCNET says how to scale and crop;
            INPUT.RANDOM_FLIP is unknown; or Detectron2's resize to INPUT.{MIN,MAX}_SIZE_TRAIN is asked for.
    """
    augmentations: list[T.Augmentation] = []
    crop, extra = cfg.INPUT.CROP, cfg.INPUT.CCNET
    if list(cfg.INPUT.MIN_SIZE_TRAIN or ()) != [0]:  # with which Detectron2 resizes nothing either
        refuse_without_effect(
            cfg.INPUT,
            "INPUT",
            {"MIN_SIZE_TRAIN": (0,), "MIN_SIZE_TRAIN_SAMPLING": "choice", "MAX_SIZE_TRAIN": 1333},
            "images are scaled and cropped together here: leave it out and set INPUT.CCNET.SHORT_SIDES or SCALE_RANGE, "
            "INPUT.CROP.ENABLED to True, INPUT.CROP.TYPE to 'absolute' and INPUT.CROP.SIZE.",
        )
    set_here = [key for key, value in extra.items() if key != "PHOTOMETRIC" and value]
    if set_here and not crop.ENABLED:
        raise UserError(
            f"INPUT.CCNET.{set_here[0]} is set, but INPUT.CROP.ENABLED is False: images are scaled and cropped "
            "together, so set that to True and INPUT.CROP.SIZE to [height, width] in pixels."
        )
    if crop.ENABLED:
        if crop.TYPE != "absolute":
            raise UserError(
                f"INPUT.CROP.TYPE is {crop.TYPE!r}: all crops need one size, so set INPUT.CROP.TYPE to 'absolute' and "
                "INPUT.CROP.SIZE to [height, width] in pixels."
            )
        augmentations.append(
            RandomScaleCrop(
                crop.SIZE,
                scale_range=extra.SCALE_RANGE or None,
                short_side_choices=extra.SHORT_SIDES or None,
                base_size=extra.BASE_SIZE or None,
                category_max_ratio=extra.CATEGORY_MAX_RATIO or None,
                pad_value=cfg.MODEL.PIXEL_MEAN,
            )
        )
    check_choice("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, _FLIPS)
    if cfg.INPUT.RANDOM_FLIP != "none":
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if extra.PHOTOMETRIC:
        augmentations.append(RandomPhotometricDistortion(image_format=cfg.INPUT.FORMAT))
    return augmentations


def test_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Detectron2's resize to INPUT.{MIN,MAX}_SIZE_TEST; none where MIN_SIZE_TEST is 0."""
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        return []
    return [ResizeToFit(long_side=cfg.INPUT.MAX_SIZE_TEST, short_side=cfg.INPUT.MIN_SIZE_TEST)]
