"""What several tests of the engine train."""

import pytest

from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset, register_all
from ccnet_d2.engine.overrides import load_run


@pytest.fixture
def small_run(tmp_path, monkeypatch, catalogs_as_before):
    """Function that gives a run of seconds, with overrides."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_synthetic_dataset(tmp_path / "ccnet_synthetic", SyntheticConfig(train_images=4, val_images=2))
    register_all(tmp_path)
    small = [
        "train.max_iter=1",
        "train.device=cpu",
        "train.seed=0",
        "train.num_pictures=0",
        f"train.output_dir={tmp_path}/output",
        "dataloader.train.total_batch_size=2",
        "model.sem_seg_head.channels=16",
    ]
    return lambda *overrides: load_run("toy/ccnet_synthetic.py", [*small, *overrides])
