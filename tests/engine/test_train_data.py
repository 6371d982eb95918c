"""The training loader that a run gets."""

import threading

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from omegaconf import OmegaConf

from ccnet_d2.data import train_loader
from ccnet_d2.data.train_loader import TrainLoader
from ccnet_d2.engine.saving import SaveCheckpoints
from ccnet_d2.engine.train_data import build_train_loader
from ccnet_d2.errors import UserError


def records(names):
    return [{"file_name": f"{names}_{i}", "width": 1, "height": 1} for i in range(10)]


def own_loader():
    return []


def config(seed=5, **loader):
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.train = dict(seed=seed, device="cpu", on_bad_sample="stop", bad_sample_budget=1)
    cfg.names = "set"
    cfg.dataloader = dict()
    cfg.dataloader.train = L(build_detection_train_loader)(
        dataset=L(records)(names="${....names}"),
        mapper=None,
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=0,
    )
    cfg.dataloader.train.update(loader)
    return cfg


def names(loader, count=6):
    batches = iter(loader)
    return [record["file_name"] for _ in range(count) for record in next(batches)]


def test_detectron2s_loader_becomes_one_that_can_be_resumed():
    cfg = config()
    before = OmegaConf.to_container(cfg, resolve=False)
    loader = build_train_loader(cfg)
    assert isinstance(loader, TrainLoader) and loader.seed == 5 and not loader.bad_samples.skip
    assert names(loader)[0].startswith("set_")
    assert OmegaConf.to_container(cfg, resolve=False) == before
    assert names(build_train_loader(cfg)) == names(build_train_loader(cfg))


def test_the_loader_by_its_name_is_one_too():
    """As an override of the command line gives it."""
    cfg = config(_target_="detectron2.data.build_detection_train_loader")
    assert isinstance(build_train_loader(cfg), TrainLoader)


@pytest.mark.parametrize(("what", "skip"), [("skip", True), ("stop", False)])
def test_the_run_says_what_becomes_of_bad_samples(what, skip):
    cfg = config(seed=0)
    cfg.train.update(on_bad_sample=what, bad_sample_budget=3)
    loader = build_train_loader(cfg)
    assert (loader.bad_samples.skip, loader.bad_samples.budget, loader.seed) == (skip, 3, 0)


@pytest.mark.parametrize(
    ("device", "options", "pinned"),
    [("cpu", {}, False), ("cuda", {}, True), ("cuda:1", {}, True), ("cuda", {"pin_memory": False}, False)],
)
def test_batches_for_a_gpu_are_in_page_locked_memory(monkeypatch, device, options, pinned):
    made = {}
    monkeypatch.setattr(train_loader, "DataLoader", lambda *args, **kwargs: made.update(kwargs) or [])
    cfg = config(**options)
    cfg.train.device = device
    list(build_train_loader(cfg))
    assert made["pin_memory"] is pinned


def test_without_a_seed_one_is_drawn():
    np.random.seed(1)
    first, second = build_train_loader(config(seed=-1)), build_train_loader(config(seed=-1))
    assert first.seed != second.seed
    second.load_state_dict(first.state_dict())
    assert names(first) == names(second)


def test_a_sampler_of_the_config():
    factors = torch.tensor([1.0] * 9 + [5.0])
    cfg = config(sampler=L(RepeatFactorTrainingSampler)(repeat_factors=factors))
    drawn = names(build_train_loader(cfg), 14)
    assert drawn.count("set_9") >= 5
    np.random.seed(3)
    assert names(build_train_loader(cfg), 14) == drawn


def test_other_loaders_are_taken_as_they_are(caplog):
    cfg = config()
    cfg.dataloader.train = L(own_loader)()
    assert build_train_loader(cfg) == []
    assert "a resumed run will see other samples" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"), [("dataloader.train", None), ("dataloader.train", 5), ("dataloader.train.sampler", 5)]
)
def test_what_is_no_loader_and_no_sampler(key, value):
    cfg = config()
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=f"^{key}={'null' if value is None else value} builds no object"):
        next(iter(build_train_loader(cfg)))


@pytest.mark.parametrize(("period", "keep"), [(0, None), (1, 0)])
def test_wrong_saving_options(period, keep):
    with pytest.raises(UserError, match="have to be at least 1"):
        SaveCheckpoints(None, period, keep)


def test_signals_outside_the_main_thread(caplog):
    def listen():
        with SaveCheckpoints(None, 1).listening():
            pass

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert "SIGTERM will not save" in caplog.text
