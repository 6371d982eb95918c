"""The INPUT keys of a yacs config that are refused; test_yacs.py holds the others to what they make."""

import pytest
from detectron2.data import transforms as T

from ccnet_d2.engine.yacs_augmentations import train_augmentations
from ccnet_d2.engine.yacs_config import load_config
from ccnet_d2.errors import UserError

CONFIG = "yacs/toy/ccnet_synthetic.yaml"


@pytest.mark.parametrize(
    ("key", "value"),
    [("MIN_SIZE_TRAIN", "(512,)"), ("MIN_SIZE_TRAIN_SAMPLING", "range"), ("MAX_SIZE_TRAIN", 2048)],
)
def test_detectron2_s_resize_of_training_images_is_refused(key, value):
    """It would not be done; images keep their size, or have that of INPUT.CROP."""
    cfg = load_config(CONFIG, [f"INPUT.{key}", str(value)])
    with pytest.raises(UserError, match=rf"^INPUT\.{key} is .* set INPUT\.CCNET\.SHORT_SIDES"):
        train_augmentations(cfg)
    cfg = load_config(CONFIG, ["INPUT.MAX_SIZE_TRAIN", "2048", "INPUT.MIN_SIZE_TRAIN", "(0,)"])
    assert [type(one) for one in train_augmentations(cfg)] == [T.RandomFlip]
