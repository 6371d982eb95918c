"""Values of `train` that are refused before anything is built."""

import re

import pytest
from omegaconf import OmegaConf

from ccnet_d2.engine.overrides import load_run
from ccnet_d2.engine.settings import check_init_checkpoint, check_seed, check_settings
from ccnet_d2.errors import UserError


def run_with(*overrides: str):
    return load_run("toy/ccnet_synthetic.py", overrides)


def test_what_runs_come_with_is_taken():
    check_settings(run_with())
    check_settings(run_with("train.checkpointer.max_to_keep=null", "train.seed=0", "train.num_pictures=0"))


@pytest.mark.parametrize("value", ["1.5", "null", "true", "[1]", "2147483648", "5000000000000"])
@pytest.mark.parametrize("check", [check_seed, check_settings])
def test_what_is_no_seed(check, value):
    with pytest.raises(UserError, match=r"^train\.seed=.* has to be a whole number up to 2147483647; "):
        check(run_with(f"train.seed={value}"))


@pytest.mark.parametrize("value", [-(2**70), -1, 0, 2**31 - 1])
def test_seeds(value):
    check_seed(run_with(f"train.seed={value}"))


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("train.max_iter", 1),
        ("train.log_period", 1),
        ("train.eval_period", 0),
        ("train.num_pictures", 0),
        ("train.non_finite_retries", 0),
        ("train.bad_sample_budget", 0),
        ("train.checkpointer.period", 1),
        ("train.checkpointer.max_to_keep", 1),
        ("dataloader.train.total_batch_size", 1),
        ("dataloader.train.num_workers", 0),
        ("dataloader.test.num_workers", 0),
        ("model.sem_seg_head.num_classes", 1),
    ],
)
def test_whole_numbers(key, least):
    check_settings(run_with(f"{key}={least}"))
    for value in (least - 1, least + 0.5, True):
        message = f"{key}={value} has to be a whole number, {least} or more."
        cfg = run_with()
        OmegaConf.update(cfg, key, value)
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            check_settings(cfg)


@pytest.mark.parametrize("key", ["train.init_may_lack", "train.init_may_differ"])
def test_patterns_of_names(key):
    """As characters, "sem_seg_head.*" allowed all weights to be missing: "*" is one of them."""
    check_settings(run_with(f"{key}=[]"))
    check_settings(run_with(f"{key}=['sem_seg_head.*','x']"))
    for value in ("sem_seg_head.*", "null", "5", "[5]"):
        message = f"{key}={value.replace('null', 'None')} has to be a list of patterns of names, such as "
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            check_settings(run_with(f"{key}={value}"))


@pytest.mark.parametrize("key", ["model.num_classes", "model.roi_heads.num_classes"])
@pytest.mark.parametrize("value", ["x", "80.0"])
def test_classes_of_detectron2_s_models(key, value):
    """They do not say what they are, so that overrides take anything for them."""
    cfg = run_with()
    cfg.model = {"num_classes": 80} if key.count(".") == 1 else {"roi_heads": {"num_classes": 80}}
    check_settings(cfg)
    node = cfg.model if key.count(".") == 1 else cfg.model.roi_heads
    node.num_classes = float(value) if value != "x" else value
    with pytest.raises(UserError, match=f"^{re.escape(key)}={value} has to be a whole number, 1 or more"):
        check_settings(cfg)


@pytest.mark.parametrize("check", [check_init_checkpoint, check_settings])
def test_names_of_weights(check):
    for value in ("null", "''", "a/b.pth"):
        check(run_with(f"train.init_checkpoint={value}"))
    for value in ("5", "True", "['a.pth']"):
        message = f"train.init_checkpoint={value} has to be the name of a file, or '' for random weights."
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            check(run_with(f"train.init_checkpoint={value}"))


def test_runs_of_detectron2_need_no_seed():
    cfg = run_with()
    del cfg.train["seed"]
    check_seed(cfg)
