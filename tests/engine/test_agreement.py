"""Every run that comes with the project agrees with itself, and disagreements are named."""

from pathlib import Path

import pytest

from ccnet_d2.engine import apply_overrides
from ccnet_d2.engine.agreement import check_agreement
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.glob("*/*.py")
    if path.parent.name not in ("common", "quick_schedules")
)


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_the_project(name):
    check_agreement(get_config(name))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.sem_seg_head.num_classes=21",
            r"num_classes is 21, but the training set 'camvid.*' has 11 classes",
        ),
        ("dataloader.train.dataset.names=lip_sem_seg_train", "'lip_sem_seg_train' has 20 classes"),
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
