"""RCCA in Detectron2's detection models: same detections at the start, training, evaluation, DDP, the model zoo.

The whole model zoo is walked with CCNET_TEST_WHOLE_ZOO=1 (some ten minutes); a sample of it always.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

from ccnet_d2 import add_rcca
from ccnet_d2.data.datasets.coco_fixture import (
    CocoFixtureConfig,
    generate_coco_fixture,
    register_coco_fixture,
)
from ccnet_d2.engine import Trainer
from ccnet_d2.engine.command_line import main
from ccnet_d2.model_zoo import get_config

CONFIG = "quick_schedules/mask_rcnn_rcca_R_18_FPN_overfit.py"
GAMMA = "backbone.bottom_up.res4.1.rcca.gamma"
NEW_KEYS = ["rcca.gamma", "rcca.qkv.bias", "rcca.qkv.weight"]


def inputs(seed=0, size=64, *, mask_format="polygon", classes=2):
    """One image with two objects, and everything any of Detectron2's models reads about them."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((size, size))
    boxes = torch.tensor([[4.0, 6.0, 34.0, 40.0], [20.0, 24.0, 60.0, 58.0]]) * size / 64
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(2) % classes
    polygons = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    masks = PolygonMasks(polygons)
    instances.gt_masks = masks if mask_format == "polygon" else BitMasks.from_polygon_masks(masks, size, size)
    points = torch.rand(2, 17, 3, generator=generator) * (boxes[:, None, 2:] - boxes[:, None, :2]).max()
    points[..., :2] = points[..., :2] * 0.5 + boxes[:, None, :2]
    points[..., 2] = 2
    instances.gt_keypoints = Keypoints(points)
    proposals = Instances((size, size))
    proposals.proposal_boxes = Boxes(boxes + 1)
    proposals.objectness_logits = torch.zeros(2)
    return {
        "image": torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8),
        "height": size,
        "width": size,
        "instances": instances,
        "proposals": proposals,
        "sem_seg": torch.randint(0, 2, (size, size), generator=generator),
    }


def small_mask_rcnn(*, rcca):
    """The quick schedule's model, with or without RCCA, keeping every detection whatever its score."""
    cfg = get_config(CONFIG)
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    if not rcca:
        cfg.model.backbone.bottom_up._target_ = "detectron2.modeling.ResNet"
    torch.manual_seed(0)
    return instantiate(cfg.model)


def test_same_detections_before_training():
    plain, model = small_mask_rcnn(rcca=False).eval(), small_mask_rcnn(rcca=True).eval()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert sorted(result.missing_keys) == [f"backbone.bottom_up.res4.1.{key}" for key in NEW_KEYS]
    batch = [
        {k: v for k, v in inputs(seed, 96).items() if k in ("image", "height", "width")} for seed in (0, 1)
    ]
    with torch.no_grad():
        expected, found = plain(batch), model(batch)
        for one, other in zip(expected, found, strict=True):
            one, other = one["instances"], other["instances"]
            assert len(one) == len(other) > 5
            torch.testing.assert_close(other.scores, one.scores, rtol=0, atol=1e-5)
            torch.testing.assert_close(other.pred_boxes.tensor, one.pred_boxes.tensor, rtol=0, atol=1e-3)
            assert torch.equal(other.pred_classes, one.pred_classes)
            assert (other.pred_masks != one.pred_masks).float().mean() < 1e-5
        # The scores would show it, if the module were not the identity.
        nn.init.constant_(model.backbone.bottom_up.res4[1].rcca.gamma, 1.0)
        moved = model(batch)[0]["instances"]
        assert len(moved) != len(expected[0]["instances"]) or not torch.allclose(
            moved.scores, expected[0]["instances"].scores, rtol=0, atol=1e-5
        )


@pytest.fixture
def fixture_set(tmp_path):
    root = tmp_path / "set"
    generate_coco_fixture(root, CocoFixtureConfig(images=4, size=96))
    register_coco_fixture(root)
    yield root
    register_coco_fixture()


def test_train_net_trains_evaluates_and_resumes(fixture_set, tmp_path, capsys):
    output = tmp_path / "output"

    def train_net(*arguments, directory=output):
        flags = [a for a in arguments if a.startswith("--")]
        overrides = [a for a in arguments if not a.startswith("--")]
        options = ["train.max_iter=10", "train.device=cpu", "dataloader.train.total_batch_size=2"]
        status = main(
            ["--config-file", CONFIG, *flags, *options, *overrides, f"train.output_dir={directory}"]
        )
        return status, capsys.readouterr().err

    assert train_net()[0] == 0
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 9 and checkpoint["model"][GAMMA].abs() > 1e-6
    results = json.loads((output / "evaluation.json").read_text())
    assert set(results) == {"bbox", "segm"} and all(0 <= results[task]["AP"] <= 100 for task in results)

    again = tmp_path / "again"
    status, _ = train_net(
        "--eval-only", f"train.init_checkpoint={output / 'model_final.pth'}", directory=again
    )
    assert status == 0
    assert json.loads((again / "evaluation.json").read_text()) == results  # null for what does not occur

    assert train_net("--resume", "train.max_iter=12")[0] == 0
    resumed = torch.load(output / "model_final.pth", weights_only=True)
    assert resumed["iteration"] == 11 and resumed["model"][GAMMA] != checkpoint["model"][GAMMA]


def test_plain_checkpoint_starts_the_run_with_rcca(fixture_set, tmp_path):
    torch.save({"model": small_mask_rcnn(rcca=False).state_dict()}, tmp_path / "plain.pth")
    options = [f"train.init_checkpoint={tmp_path / 'plain.pth'}", f"train.output_dir={tmp_path / 'output'}"]
    options += ["train.max_iter=1", "train.device=cpu", "dataloader.train.total_batch_size=1"]
    assert main(["--config-file", CONFIG, *options]) == 0
    log = (tmp_path / "output/log.txt").read_text()
    told = re.search(r"not found in the checkpoint:\n(.*?)\n\[", log, re.DOTALL)
    names = re.sub(r"\x1b\[[0-9;]*m", "", told[1]).split("\n")
    assert names == [
        "backbone.bottom_up.res4.1.rcca.gamma",
        "backbone.bottom_up.res4.1.rcca.qkv.{bias, weight}",
    ]
    assert "not used by the model" not in log and "do not appear" not in log


@pytest.mark.parametrize("count", [2, 80])
def test_another_number_of_classes_is_refused_before_the_training(fixture_set, tmp_path, capsys, count):
    """A COCO file of one's own, whose classes are known when it is read. The evaluation failed, or nothing did."""
    own = tmp_path / "own.py"
    own.write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        "from ccnet_d2.model_zoo import get_config\n"
        f"files = {str(fixture_set / 'annotations.json')!r}, {str(fixture_set / 'images')!r}\n"
        "register_coco_instances('own_things', {}, *files)\n"
        f"run = get_config({CONFIG!r})\n"
        "model, dataloader, train = run.model, run.dataloader, run.train\n"
        "optimizer, lr_multiplier = run.optimizer, run.lr_multiplier\n"
        "dataloader.train.dataset.names = dataloader.test.dataset.names = 'own_things'\n"
    )
    output = tmp_path / "output"
    options = ["train.max_iter=1", "train.device=cpu", f"train.output_dir={output}"]
    try:
        status = main(["--config-file", str(own), *options, f"model.roi_heads.num_classes={count}"])
    finally:
        DatasetCatalog.remove("own_things")
        MetadataCatalog.remove("own_things")
    error = capsys.readouterr().err.splitlines()[-1]
    message = f"model.roi_heads.num_classes is {count}, but the training set 'own_things' has 3 classes."
    assert status == 1 and error == f"error: {message}"
    assert not (output / "model_final.pth").exists()


def test_missing_fixture_is_one_sentence(tmp_path, capsys):
    register_coco_fixture(tmp_path / "nothing")
    try:
        assert main(["--config-file", CONFIG, "train.device=cpu", f"train.output_dir={tmp_path / 'o'}"]) == 1
    finally:
        register_coco_fixture()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: There is no COCO fixture in") and "make_coco_fixture.py" in error


def test_trains_in_two_processes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    gammas = [output.splitlines()[-1] for output in outputs]
    assert gammas[0] == gammas[1] and float(gammas[0]) != 0


def train_as_one_of_two(rank: int, store: str) -> None:
    """Three steps of DDP on this process's own images; prints gamma."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(
        small_mask_rcnn(rcca=True).train(), find_unused_parameters=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [[inputs(10 * step + rank)] for step in range(3)]
    trainer = Trainer(model, batches, optimizer)
    trainer.train(0, len(batches))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(both, weights)
    assert torch.equal(*both), "the two processes have different weights"
    torch.distributed.destroy_process_group()
    print(model.module.get_parameter(GAMMA).item(), flush=True)


# --- Detectron2's model zoo -------------------------------------------------------------------------------------------

ZOO = Path(model_zoo.__file__).parent / "configs"
WHOLE_ZOO = os.environ.get("CCNET_TEST_WHOLE_ZOO") == "1"
SAMPLE = [
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py",
]
NEEDS = {
    "_dconv": "deformable convolution has no CPU kernel",
    "mmdet_": "needs mmdet",
}


def zoo_configs():
    files = (path for path in ZOO.rglob("*") if path.suffix in (".py", ".yaml"))
    names = sorted(path.relative_to(ZOO).as_posix() for path in files)
    return [name for name in names if not name.startswith("common/")]


def build_zoo_model(name):
    """A model of the zoo on the CPU, with its mask format."""
    if name.endswith(".yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(ZOO / name))
        cfg.MODEL.DEVICE = "cpu"
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES > 2
        return build_model(cfg), cfg.INPUT.MASK_FORMAT
    cfg = LazyConfig.load(str(ZOO / name))
    if "model" not in cfg or "backbone" not in cfg.model:
        pytest.skip("no detection model")
    return instantiate(cfg.model), OmegaConf.select(
        cfg, "dataloader.train.mapper.instance_mask_format", default="polygon"
    )


def tame(model):
    """Random weights of deep networks with frozen norms overflow: let each block add a little. SyncBN needs a GPU."""
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.SyncBatchNorm):
                setattr(module, child_name, nn.BatchNorm2d(child.num_features))
    for module in model.modules():
        norm = getattr(getattr(module, "conv3", None), "norm", None)
        if norm is not None:
            with torch.no_grad():
                norm.weight.fill_(0.1)


def check_takes_rcca(model, where, mask_format="polygon"):
    before = list(model.state_dict())
    add_rcca(model, where)
    added = [key for key in model.state_dict() if key not in set(before)]
    assert len(added) == 3 and [key for key in model.state_dict() if key not in set(added)] == before
    with EventStorage():
        losses = model.train()([inputs(seed, mask_format=mask_format) for seed in (0, 1)])
    if not isinstance(losses, dict):
        losses = dict(enumerate(losses))
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    assert all(parameters[key].grad is not None and parameters[key].grad.isfinite().all() for key in added)
    (gamma,) = (parameters[key] for key in added if key.endswith("gamma"))
    assert gamma.grad != 0
    assert len(model.eval()([inputs()])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_configs() if WHOLE_ZOO else SAMPLE)
def test_model_zoo_takes_rcca(name):
    for part, reason in NEEDS.items():
        if part in name:
            pytest.skip(reason)
    torch.manual_seed(0)
    model, mask_format = build_zoo_model(name)
    stages = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if not stages & {"res4", "s3"}:
        pytest.skip("its backbone has no res4")
    (where,) = stages & {"res4", "s3"}
    tame(model)
    check_takes_rcca(model, where, mask_format)


@pytest.mark.parametrize("project", ["PointRend", "DeepLab"])
def test_projects_take_rcca(project):
    cfg = get_cfg()
    if project == "PointRend":
        cfg.merge_from_file(str(ZOO / "Base-RCNN-FPN.yaml"))
        add_pointrend_config(cfg)
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
        cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
        cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.POINT_HEAD.NUM_CLASSES = 3
        cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION = 7
        cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ["p2"]
        cfg.MODEL.ROI_MASK_HEAD.FC_DIM = 32
        cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.RESNETS.DEPTH = 18
    else:
        add_deeplab_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
        cfg.MODEL.RESNETS.RES5_MULTI_GRID = [1, 2, 4]
        cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 128
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3PlusHead"
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res5"]
        cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["res2"]
        cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [48]
        cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
        cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 32
        cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
        cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE = "cross_entropy"
        cfg.INPUT.CROP.ENABLED = False
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    tame(model)
    check_takes_rcca(model, "res4", "bitmask" if project == "PointRend" else "polygon")


if __name__ == "__main__":
    train_as_one_of_two(int(sys.argv[1]), sys.argv[2])
