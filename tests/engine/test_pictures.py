"""Pictures of predictions during training."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf
from PIL import Image

from ccnet_d2.data import SampleError, SyntheticConfig, generate_synthetic_dataset, register_all
from ccnet_d2.engine import apply_overrides
from ccnet_d2.engine.pictures import PredictionPictures, draw_predictions
from ccnet_d2.model_zoo import get_config


@pytest.fixture
def run(tmp_path):
    """The toy run on a synthetic set of two validation images."""
    generate_synthetic_dataset(tmp_path / "ccnet_synthetic", SyntheticConfig(train_images=1, val_images=2))
    register_all(tmp_path)
    yield lambda *overrides: apply_overrides(
        get_config("toy/ccnet_synthetic.py"), ["train.num_pictures=2", *overrides]
    )
    register_all()


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("test.inference=whole", [(48, 48)] * 2),
        ("test.inference=null", [(48, 48)] * 2),
        # Four tiles of 32 each, as the images meet the model in the evaluation.
        ("test.inference={_target_: ccnet_d2.inference.SlidingWindow, tile: 32, stride: 16}", [(32, 32)] * 8),
    ],
)
def test_pictures_are_drawn_in_the_test_mode(run, tmp_path, mode, sizes):
    cfg = run(mode)
    model = instantiate(cfg.model).train()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.extend(tuple(x["image"].shape[1:]) for x in args[0]))
    draw_predictions(cfg, model, tmp_path / "pictures/one.png")
    assert seen == sizes and model.training
    with Image.open(tmp_path / "pictures/one.png") as picture:
        assert np.ptp(np.asarray(picture)) > 100


@pytest.mark.parametrize(("period", "drawn_after"), [(3, [3, 6, 7]), (7, [7]), (0, [7])])
def test_pictures_are_drawn_with_each_evaluation_and_at_the_end(period, drawn_after, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ccnet_d2.engine.pictures.draw_predictions", lambda *args: drawn.append(args))
    cfg = OmegaConf.create({"train": {"eval_period": period, "output_dir": str(tmp_path)}})
    model = torch.nn.Identity()
    hook = PredictionPictures(cfg, model)
    for iteration in range(7):
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=7)
        hook.after_step()
    assert drawn == [(cfg, model, tmp_path / f"pictures/iter_{done:07d}.png") for done in drawn_after]


def test_predictions_are_the_models(run, tmp_path, monkeypatch):
    cfg = run()
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    drawn = {}
    monkeypatch.setattr(
        "ccnet_d2.engine.pictures.save_prediction_grid",
        lambda path, images, predictions, *args, **kwargs: drawn.update(
            images=images, predictions=predictions
        ),
    )
    draw_predictions(cfg, model, tmp_path / "one.png")
    for image, prediction in zip(drawn["images"], drawn["predictions"], strict=True):
        with torch.no_grad():
            logits = model([{"image": torch.from_numpy(image).permute(2, 0, 1)}])[0]["sem_seg"]
        np.testing.assert_array_equal(prediction, logits.argmax(0).numpy())


def test_a_label_map_of_another_size_is_named(run, tmp_path):
    """Pictures are drawn before the last evaluation; NumPy said that it could not broadcast."""
    cfg = run()
    record = DatasetCatalog.get(cfg.dataloader.test.dataset.names)[0]
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(record["sem_seg_file_name"])
    message = f"'{record['sem_seg_file_name']}' is 48x40, but its image '{record['file_name']}' is 48x48"
    with pytest.raises(SampleError, match=re.escape(message)):
        draw_predictions(cfg, instantiate(cfg.model), tmp_path / "one.png")


@pytest.mark.parametrize(
    ("count", "labelled", "expected"),
    [
        (3, range(10), [0, 3, 6]),
        (4, range(10), [0, 2, 5, 7]),
        (1, range(10), [0]),
        (20, range(10), range(10)),
        (2, [2, 5, 8, 9], [2, 8]),  # a video of which some frames have label maps
    ],
)
def test_pictures_are_spread_over_the_images_with_label_maps(
    run, tmp_path, monkeypatch, count, labelled, expected
):
    cfg = run(f"train.num_pictures={count}")
    name = cfg.dataloader.test.dataset.names
    whole = DatasetCatalog.get(name)[0]
    frames = []
    for index in range(10):
        frame = whole | {"file_name": str(tmp_path / f"frame{index}.png")}
        shutil.copy(whole["file_name"], frame["file_name"])
        if index not in labelled:
            del frame["sem_seg_file_name"]
        frames.append(frame)
    monkeypatch.setattr(DatasetCatalog, "get", lambda _: frames)
    titles = []
    monkeypatch.setattr(
        "ccnet_d2.engine.pictures.save_prediction_grid",
        lambda *args, row_titles, **kwargs: titles.extend(row_titles),
    )
    draw_predictions(cfg, instantiate(cfg.model), tmp_path / "one.png")
    assert titles == [f"frame{index}" for index in expected]
