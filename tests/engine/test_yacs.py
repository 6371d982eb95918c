"""A yacs config from train_net.py's command line: train, resume, evaluate; and that it is the LazyConfig's run."""

import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.engine import default_argument_parser
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import build_optimizer

from ccnet_d2.data import (
    SyntheticConfig,
    generate_synthetic_dataset,
    register_all,
    register_sem_seg_folder,
)
from ccnet_d2.data.transforms import RandomPhotometricDistortion, RandomScaleCrop, ResizeToFit
from ccnet_d2.engine import yacs, yacs_augmentations
from ccnet_d2.engine.command_line import main
from ccnet_d2.engine.yacs_config import load_config
from ccnet_d2.errors import UserError
from ccnet_d2.inference import build_mode
from ccnet_d2.model_zoo import get_config

CONFIG = "yacs/toy/ccnet_synthetic.yaml"


@pytest.fixture
def train_net(tmp_path, monkeypatch, capsys):
    """Runs train_net.py in this process on a synthetic set of eight images; gives its status and last error."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_synthetic_dataset(tmp_path / "ccnet_synthetic", SyntheticConfig(train_images=8, val_images=2))
    register_all(tmp_path)
    small = {
        "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
        "MODEL.DEVICE": "cpu",
        "SEED": 1,
    }

    def run(*flags, config=CONFIG, output="output", **options):
        pairs = {**small, "OUTPUT_DIR": tmp_path / output}
        pairs |= {key.replace("__", "."): value for key, value in options.items()}
        status = main(
            ["--config-file", str(config), *flags, *[str(x) for pair in pairs.items() for x in pair]]
        )
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return status, errors[-1] if errors else ""

    yield run
    monkeypatch.undo()
    register_all()


def metrics(folder) -> dict:
    """Each metric's last value."""
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {key: value for record in records for key, value in record.items()}


def test_train_resume_evaluate(train_net, tmp_path):
    output = tmp_path / "output"
    status, error = train_net(
        TEST__CCNET__MODE="slide", TEST__CCNET__TILE="(24,24)", MODEL__CCNET__CATEGORY_CONSISTENT="piecewise"
    )
    assert (status, error) == (0, "")
    for name in ("model_final.pth", "last_checkpoint", "config.yaml", "log.txt"):
        assert (output / name).is_file(), name
    assert f"Saving checkpoint to {output}/model_final.pth" in (output / "log.txt").read_text()
    record = metrics(output)
    assert record["loss_category_consistent"] > 0 and record["loss_sem_seg_aux"] > 0
    slide = record["sem_seg/mIoU"]

    checkpoint = output / "model_final.pth"
    options = {"MODEL__WEIGHTS": checkpoint, "TEST__CCNET__MODE": "slide", "TEST__CCNET__TILE": "(24,24)"}
    assert train_net("--eval-only", output="again", TEST__CCNET__STRIDE=None, **options)[0] == 0
    # The same weights in the same mode; the log holds the percentages with four decimals.
    assert f"{slide:.4f}" in (tmp_path / "again/log.txt").read_text()

    assert train_net("--eval-only", "--resume") == (0, "")  # the last checkpoint, without its name
    expected = {"TEST__EXPECTED_RESULTS": [["sem_seg", "mIoU", round(slide, 4), 0.01]]}
    assert train_net("--eval-only", output="again", **expected, **options) == (0, "")
    expected["TEST__EXPECTED_RESULTS"][0][2] += 1
    with pytest.raises(SystemExit, match="1"):  # as it ends a training
        train_net("--eval-only", output="again", **expected, **options)
    assert train_net("--resume", SOLVER__MAX_ITER=3, MODEL__CCNET__CATEGORY_CONSISTENT="piecewise")[0] == 0
    assert torch.load(checkpoint, weights_only=True)["iteration"] == 2
    status, error = train_net("--resume", SOLVER__MAX_ITER=3, MODEL__CCNET__CATEGORY_CONSISTENT="piecewise")
    assert status == 1 and "Nothing to train" in error


def test_wrong_input_is_one_sentence(train_net, tmp_path):
    status, error = train_net(MODEL__SEM_SEG_HEAD__NUM_CLASSES=54)
    assert status == 1 and "num_classes is 54, but the data set has 4 classes" in error
    status, error = train_net(SOLVER__MAX_ITR=3)
    assert status == 1 and "SOLVER.MAX_ITR" in error
    status, error = train_net(MODEL__CCNET__CONTEXT="rca")
    assert status == 1 and "'rca'" in error
    status, error = train_net(INPUT__CROP__ENABLED=True)
    assert status == 1 and "INPUT.CROP.TYPE" in error and "absolute" in error
    status, error = train_net(INPUT__CCNET__SCALE_RANGE="(0.5,2.0)")
    assert status == 1 and "INPUT.CCNET.SCALE_RANGE is set, but INPUT.CROP.ENABLED is False" in error
    status, error = train_net(INPUT__RANDOM_FLIP="horizontally")
    assert status == 1
    assert "INPUT.RANDOM_FLIP='horizontally' is not one of 'horizontal', 'vertical', 'none'." in error
    status, error = train_net(SOLVER__AMP__ENABLED=True)
    assert status == 1 and "SOLVER.AMP.ENABLED is True" in error and "not on cpu: set it to False" in error
    status, error = train_net(SOLVER__WARMUP_ITERS=5)
    assert status == 1 and "SOLVER.WARMUP_ITERS is 5, but SOLVER.LR_SCHEDULER_NAME PolyLR has no" in error
    status, error = train_net(TEST__CCNET__MODE="tiles", output="untrained")
    assert status == 1 and "unknown test mode 'tiles'" in error
    status, error = train_net(TEST__CCNET__MODE="slide", TEST__CCNET__TILE=None, output="untrained")
    assert status == 1 and "tile is (), but a side, or height and width" in error
    assert not list((tmp_path / "untrained").glob("*.pth")), "found out after the training"
    assert train_net("--eval-only") == (
        1,
        "error: --eval-only needs a checkpoint: name one with MODEL.WEIGHTS PATH.",
    )
    status, error = train_net("--eval-only", DATASETS__TEST="()")
    assert status == 1 and "--eval-only: DATASETS.TEST names no data set" in error
    status, error = train_net(config="yacs/toy/ccnet_sinthetic.yaml")
    assert status == 1 and "no config" in error


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("SOLVER.MAX_ITER", 0, ["SOLVER.MAX_ITER is 0, but has to be 1 or more"]),
        ("SOLVER.MAX_ITER", None, ["SOLVER.MAX_ITER is None, but has to be 1 or more"]),
        (
            "SOLVER.REFERENCE_WORLD_SIZE",
            4,
            ["SOLVER.IMS_PER_BATCH is 2, but has to be a multiple of SOLVER.REFERENCE_WORLD_SIZE, 4."],
        ),
        ("MODEL.META_ARCHITECTURE", "CCnet", ["MODEL.META_ARCHITECTURE='CCnet' is not one of", "'CCNet'"]),
        ("MODEL.BACKBONE.NAME", "resnet", ["MODEL.BACKBONE.NAME='resnet' is not one of"]),
        (
            "MODEL.SEM_SEG_HEAD.NAME",
            "CCHead",
            ["MODEL.SEM_SEG_HEAD.NAME='CCHead' is not one of", "'CCNetHead'"],
        ),
        ("SEED", 2**40, ["SEED=1099511627776 has to be a whole number up to 2147483647; one below 0"]),
        ("SEED", None, ["SEED=None has to be a whole number"]),
        (
            "MODEL.PIXEL_MEAN",
            "[1.0]",
            ["MODEL.PIXEL_MEAN is [1.0], but needs a value for each of the 3 channels"],
        ),
        ("SOLVER.CHECKPOINT_PERIOD", 0, ["SOLVER.CHECKPOINT_PERIOD is 0, but has to be 1 or more"]),
        ("SOLVER.IMS_PER_BATCH", 0, ["SOLVER.IMS_PER_BATCH is 0, but has to be 1 or more"]),
        (
            "DATALOADER.SAMPLER_TRAIN",
            "RepeatFactorTrainingSampler",
            ["counts the classes of instances, and label maps have none: set it to 'TrainingSampler'"],
        ),
        ("DATASETS.TRAIN", "()", ["DATASETS.TRAIN names no data set to train on"]),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 0, ["MODEL.SEM_SEG_HEAD.IGNORE_VALUE is 0, but void is 255"]),
        (
            "DATASETS.TEST",
            "('nothing',)",
            ["no data set 'nothing'", 'without an evaluation: DATASETS.TEST "()".'],
        ),
        ("DATASETS.TEST", "('lip_sem_seg_val',)", ["LIP", "does not exist", "without an evaluation"]),
        (
            "DATASETS.TEST",
            "('ccnet_synthetic_val','fewer_classes')",
            ["MODEL.SEM_SEG_HEAD.NUM_CLASSES is 4, but the test set 'fewer_classes' has 2 classes"],
        ),
    ],
)
def test_what_ends_a_training_is_told_before_it(train_net, tmp_path, key, value, words):
    """Detectron2 divided by the first two, left out class 0, and asked for the test set when the training was over."""
    folders = (tmp_path / "ccnet_synthetic" / kind / "train" for kind in ("images", "labels"))
    register_sem_seg_folder("fewer_classes", *folders, classes=["a", "b"])
    status, error = train_net(**{key.replace(".", "__"): value})
    assert status == 1 and all(word in error for word in words), error
    assert not list((tmp_path / "output").glob("*.pth"))


def test_a_training_that_diverges_ends_with_a_sentence_and_what_fails_otherwise_with_its_traceback(
    train_net, tmp_path, monkeypatch
):
    status, error = train_net(SOLVER__BASE_LR=1e9, SOLVER__MAX_ITER=20)
    assert status == 1 and "Loss became infinite or NaN at iteration=" in error
    assert error.endswith("lower SOLVER.BASE_LR, or set SOLVER.CLIP_GRADIENTS.ENABLED True.")
    assert "Exception during training" not in (tmp_path / "output/log.txt").read_text()

    def fail(trainer):
        raise RuntimeError("of the program")

    monkeypatch.setattr(yacs.DefaultTrainer, "run_step", fail)
    with pytest.raises(RuntimeError, match="of the program"):
        train_net(output="failed")
    assert "Exception during training" in (tmp_path / "failed/log.txt").read_text()


def test_weights_of_another_shape_are_refused_unless_they_may_differ(train_net, tmp_path):
    """As to go on with other classes, which Detectron2 does without a word."""
    assert train_net(DATASETS__TEST="()")[0] == 0
    other = {"MODEL__WEIGHTS": tmp_path / "output/model_final.pth", "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32}
    status, error = train_net(output="other", **other)
    assert status == 1 and error.endswith(
        "name what may differ in train.init_may_differ (MODEL.CCNET.WEIGHTS_MAY_DIFFER)."
    )
    other["MODEL__CCNET__WEIGHTS_MAY_DIFFER"] = "('sem_seg_head.*',)"
    assert train_net(output="other", DATASETS__TEST="()", **other) == (0, "")
    # Weights to be evaluated have to fit, whatever a training may lack.
    status, error = train_net("--eval-only", **other)
    assert status == 1 and error.endswith("check that config and checkpoint belong together.")


def test_the_papers_schedule_starts_at_the_whole_rate_and_takes_no_other_word_for_it():
    cfg = load_config(CONFIG, ["SOLVER.WARMUP_ITERS", "0", "SOLVER.WARMUP_FACTOR", "0.1"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    assert yacs.YacsTrainer.build_lr_scheduler(cfg, optimizer).get_last_lr() == [cfg.SOLVER.BASE_LR]
    for key, value in (("WARMUP_FACTOR", "0.1"), ("WARMUP_METHOD", "constant")):
        cfg = load_config(CONFIG, [f"SOLVER.{key}", value])
        with pytest.raises(UserError, match=rf"^SOLVER.{key} is .*PolyLR has no warm-up"):
            yacs.YacsTrainer.build_lr_scheduler(cfg, optimizer)


@pytest.mark.parametrize(("key", "value"), [("POLY_LR_POWER", "2.0"), ("POLY_LR_MINIMUM", "0.01")])
def test_keys_of_the_papers_schedule_are_refused_with_another(key, value):
    cfg = load_config(CONFIG, ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", "0"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    assert yacs.YacsTrainer.build_lr_scheduler(cfg, optimizer).get_last_lr() == [cfg.SOLVER.BASE_LR]
    cfg.merge_from_list([f"SOLVER.{key}", value])
    with pytest.raises(UserError, match=rf"^SOLVER.{key} is {value}, but it belongs to .*PolyLR.*CosineLR"):
        yacs.YacsTrainer.build_lr_scheduler(cfg, optimizer)


def test_keys_of_this_package_s_own_count():
    cfg = load_config(CONFIG, ["SOLVER.POLY_LR_MINIMUM", "0.01", "SOLVER.POLY_LR_POWER", "2.0"])
    cfg.SOLVER.BASE_LR = 0.05
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    multiplier = yacs.YacsTrainer.build_lr_scheduler(cfg, optimizer)._multiplier
    assert multiplier(0.5) == pytest.approx(0.8 * 0.25 + 0.2)
    cfg.TEST.CCNET.MODE, cfg.TEST.CCNET.TILE, cfg.TEST.CCNET.STRIDE = "slide", (24, 32), (12, 8)
    assert vars(yacs._test_mode(cfg)) == vars(build_mode("slide", tile=(24, 32), stride=(12, 8)))
    cfg.INPUT.CCNET.PHOTOMETRIC, cfg.INPUT.RANDOM_FLIP = True, "none"  # without a crop
    assert [type(one) for one in yacs_augmentations.train_augmentations(cfg)] == [RandomPhotometricDistortion]


def test_test_modes_know_the_test_set(monkeypatch):
    """It says which classes change places in mirrored images."""
    given = []

    class Mode:
        def bind(self, model, names):
            given.append(names)
            return model

    monkeypatch.setattr(yacs, "_test_mode", lambda cfg: Mode())
    monkeypatch.setattr(yacs.DefaultTrainer, "test", classmethod(lambda cls, *_: {}))
    yacs.YacsTrainer.test(load_config(CONFIG), torch.nn.Identity())
    assert given == [["ccnet_synthetic_val"]]


def test_results_are_returned(train_net, tmp_path):
    options = [
        "SOLVER.MAX_ITER",
        "1",
        "SOLVER.IMS_PER_BATCH",
        "2",
        "MODEL.DEVICE",
        "cpu",
        "OUTPUT_DIR",
        str(tmp_path),
    ]
    args = default_argument_parser().parse_args(["--config-file", CONFIG])
    results = yacs.run(load_config(CONFIG, options), args, resume=False)
    assert results["sem_seg"]["mIoU"] == metrics(tmp_path)["sem_seg/mIoU"]
    # Trained further, without an evaluation
    args = default_argument_parser().parse_args(["--config-file", CONFIG])
    options += ["SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"]
    assert yacs.run(load_config(CONFIG, options), args, resume=True) is None


def test_test_images_are_read_by_the_config_s_number_of_workers(train_net, monkeypatch):
    cfg = load_config(CONFIG, ["DATALOADER.NUM_WORKERS", "1"])
    forked = []
    monkeypatch.setattr(yacs, "fork_workers", lambda loader: forked.append(loader) or loader)
    loader = yacs.YacsTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    assert loader.num_workers == 1 and forked == [loader]


def test_each_key_of_the_images_is_for_its_argument(monkeypatch):
    mappers = {}
    for split in ("train", "test"):
        name = f"build_detection_{split}_loader"
        monkeypatch.setattr(yacs, name, lambda *_, mapper, split=split, **__: mappers.update({split: mapper}))
    monkeypatch.setattr(yacs, "get_sem_seg_dataset_dicts", lambda names: [])
    cfg = load_config(CONFIG, ["INPUT.FORMAT", "BGR"])
    crop, extra = cfg.INPUT.CROP, cfg.INPUT.CCNET
    crop.ENABLED, crop.TYPE, crop.SIZE = True, "absolute", [24, 32]
    extra.BASE_SIZE, extra.SCALE_RANGE, extra.CATEGORY_MAX_RATIO = (64, 48), (0.5, 1.5), 0.7
    extra.PHOTOMETRIC, cfg.INPUT.RANDOM_FLIP = True, "vertical"
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 20, 70
    yacs.YacsTrainer.build_train_loader(cfg)
    yacs.YacsTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    for split, expected in (
        (
            "train",
            [
                RandomScaleCrop(
                    (24, 32),
                    scale_range=(0.5, 1.5),
                    base_size=(64, 48),
                    category_max_ratio=0.7,
                    pad_value=(1.0, 2.0, 3.0),
                ),
                T.RandomFlip(horizontal=False, vertical=True),
                RandomPhotometricDistortion(image_format="BGR"),
            ],
        ),
        ("test", [ResizeToFit(long_side=70, short_side=20)]),
    ):
        mapper = mappers[split]
        assert (mapper.is_train, mapper.image_format) == (split == "train", "BGR")
        found = mapper.augmentations.augs
        assert [type(one) for one in found] == [type(one) for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert {k: str(v) for k, v in vars(one).items()} == {k: str(v) for k, v in vars(other).items()}
    extra.BASE_SIZE, extra.SCALE_RANGE, extra.SHORT_SIDES = (), (), (30, 40)
    ours = yacs_augmentations.train_augmentations(cfg)[0]
    theirs = RandomScaleCrop(
        (24, 32), short_side_choices=(30, 40), category_max_ratio=0.7, pad_value=(1.0, 2.0, 3.0)
    )
    assert {k: str(v) for k, v in vars(ours).items()} == {k: str(v) for k, v in vars(theirs).items()}


def test_detectron2_s_test_time_augmentation_is_refused_before_the_training(train_net, tmp_path):
    for flags in ([], ["--eval-only"]):
        status, error = train_net(*flags, TEST__AUG__ENABLED=True)
        assert status == 1 and "TEST.AUG.ENABLED is True, but" in error and "TEST.CCNET.MODE to 'ms'" in error
    assert not list((tmp_path / "output").glob("*.pth"))


def test_test_classes_of_other_names_are_told(train_net, tmp_path, catalogs_as_before):
    folders = (tmp_path / "ccnet_synthetic" / kind / "val" for kind in ("images", "labels"))
    register_sem_seg_folder("other_names", *folders, classes=["background", "ring", "B", "A"])
    other, told = (
        {"DATASETS__TEST": "('other_names',)"},
        "in the test set 'other_names': the evaluation takes",
    )
    assert train_net(**other)[0] == 0
    assert (tmp_path / "output/log.txt").read_text().count(told) == 1
    weights = tmp_path / "output/model_final.pth"
    assert train_net("--eval-only", MODEL__WEIGHTS=weights, output="again", **other)[0] == 0
    assert (tmp_path / "again/log.txt").read_text().count(told) == 1


def test_label_maps_that_are_void_throughout_are_told(train_net, tmp_path):
    for path in (tmp_path / "ccnet_synthetic/labels/train").iterdir():
        cv2.imwrite(str(path), np.full((48, 48), 255, np.uint8))
    assert train_net(SOLVER__MAX_ITER=11, DATASETS__TEST="()")[0] == 0
    assert (tmp_path / "output/log.txt").read_text().count("The first 10 batches have no labelled pixel") == 1


def test_evaluations_of_classes_that_do_not_occur_leave_json(train_net, tmp_path):
    for path in (tmp_path / "ccnet_synthetic/labels/val").iterdir():
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(label == 3, 255, label).astype(np.uint8))
    assert train_net(TEST__EVAL_PERIOD=1)[0] == 0
    evaluated = []
    for line in (tmp_path / "output/metrics.json").read_text().splitlines():
        record = json.loads(line, parse_constant=pytest.fail)
        if "sem_seg/mIoU" in record:
            evaluated.append((record["iteration"], "sem_seg/IoU-object B" in record))
    assert evaluated == [(0, False), (2, False)]


def test_no_evaluation_after_a_failure_in_the_last_iteration(train_net, monkeypatch):
    """Of several processes the others are still in the step, and do not take part."""
    monkeypatch.setattr(yacs.YacsTrainer, "run_step", lambda self: 1 / 0)
    monkeypatch.setattr(yacs.YacsTrainer, "test", lambda *_: pytest.fail("it evaluated"))
    with pytest.raises(ZeroDivisionError):
        train_net(SOLVER__MAX_ITER=1)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_config_or_checkpoint_is_executed(train_net, tmp_path):
    canary = tmp_path / "canary"
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"MODEL:\n  WEIGHTS: !!python/object/apply:builtins.open ['{canary}', 'w']\n")
    status, error = train_net(config=bad)
    assert status == 1 and str(bad) in error
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": Payload(canary)}))
    status, error = train_net(MODEL__WEIGHTS=tmp_path / "bad.pkl")
    assert status == 1 and "bad.pkl" in error
    assert not canary.exists()


def test_the_paper_s_run_is_the_same_from_yaml_and_from_python():
    cfg = load_config("yacs/cityscapes/ccnet_R_101_D8_769x769_60k.yaml")
    lazy = get_config("cityscapes/ccnet_R_101_D8_769x769_60k.py")
    with torch.device("meta"):
        model, expected = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg), instantiate(lazy.model)
    assert str(model) == str(expected)
    assert model.input_format == expected.input_format
    for name in ("align_corners", "aux_loss_weight", "num_classes"):
        assert getattr(model.sem_seg_head, name) == getattr(expected.sem_seg_head, name)
    assert list(lazy.model.pixel_mean) == cfg.MODEL.PIXEL_MEAN
    assert list(lazy.model.pixel_std) == cfg.MODEL.PIXEL_STD

    optimizer = build_optimizer(cfg, model)
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.01, 1e-4)}
    scheduler = yacs.YacsTrainer.build_lr_scheduler(cfg, optimizer)
    assert scheduler._max_iter == lazy.train.max_iter
    assert scheduler._multiplier(0.3) == pytest.approx(instantiate(lazy.lr_multiplier)(0.3))

    ours, theirs = (
        yacs_augmentations.train_augmentations(cfg),
        instantiate(lazy.dataloader.train.mapper).augmentations.augs,
    )
    assert [vars(one) for one in ours] == [vars(one) for one in theirs]
    assert yacs_augmentations.test_augmentations(cfg) == []
    assert cfg.SOLVER.IMS_PER_BATCH == lazy.dataloader.train.total_batch_size
    assert cfg.MODEL.WEIGHTS == lazy.train.init_checkpoint
