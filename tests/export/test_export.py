"""Exported files against the model itself, on sizes that were not traced."""

import json
import logging
import re
import zipfile

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

import ccnet_d2
from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.export import (
    DEFAULT_SIZES,
    ExportedNetwork,
    ExportError,
    compare,
    export_model,
    export_run,
    files,
    load_program,
    run,
)
from ccnet_d2.export.check import Difference
from ccnet_d2.layers import CONTEXT_MODULES, CrissCrossAttention
from ccnet_d2.model_zoo import get_config

SIZES = [(1, 64, 80), (3, 49, 91), (2, 130, 32)]
TOY = "toy/ccnet_synthetic.py"


def make_model(config=TOY, *overrides):
    torch.manual_seed(0)
    model = instantiate(apply_overrides(get_config(config), list(overrides)).model).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, CrissCrossAttention):
            module.gamma.data.fill_(0.7)  # at 0, where training starts, attention would not show
            if config == TOY:
                module.qkv.weight.data.mul_(3)  # attention that is far from even
        if isinstance(module, nn.BatchNorm2d):  # as after training: statistics that are not 0 and 1
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def onnx_session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def logits_of(model, images):
    with torch.no_grad():
        outputs = model([{"image": i, "height": i.shape[-2], "width": i.shape[-1]} for i in images])
    return torch.stack([output["sem_seg"] for output in outputs])


@pytest.fixture(scope="module")
def toy():
    return make_model()


@pytest.fixture(scope="module")
def toy_onnx(toy, tmp_path_factory):
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "new" / "folder" / "toy.onnx"
    report = export_model(toy, path, metadata={"classes": '["a", "b"]'})
    assert report.path == path and report.size == path.stat().st_size
    return path


def test_one_onnx_file_takes_three_sizes(toy, toy_onnx):
    session = onnx_session(toy_onnx)
    assert [(value.name, value.shape) for value in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", ["batch", 3, "height", "width"]),
        ("logits", ["batch", 4, "height", "width"]),
    ]
    generator = torch.Generator().manual_seed(5)
    for size in SIZES:
        images = torch.randint(0, 256, (size[0], 3, *size[1:]), generator=generator).float()
        (found,) = session.run(None, {"images": images.numpy()})
        expected = logits_of(toy, images)
        assert expected.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


def test_attention_in_the_onnx_file_is_that_of_the_op(toy, toy_onnx):
    """A change at a pixel reaches its row and column after one loop, everything after two: so it does in the file."""
    session = onnx_session(toy_onnx)
    image = np.full((1, 3, 40, 48), 100, np.float32)
    changed = image.copy()
    changed[:, :, 20, 30] = 255
    before, after = (session.run(None, {"images": x})[0] for x in (image, changed))
    assert np.count_nonzero(np.abs(after - before).max(axis=1)) > 0.99 * 40 * 48


def test_the_onnx_file_is_one_file_of_plain_operators(toy_onnx):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(toy_onnx)
    assert [path.name for path in toy_onnx.parent.iterdir()] == ["toy.onnx"]
    assert {node.domain for node in model.graph.node} == {""}
    # Two of the backbone, conva, the projections of both loops, convb, fuse and the classifier.
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 8
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Gemm", "If", "Loop"}
    # Folded into the convolutions, and split without the sequences that few runtimes have.
    assert not operators & {"BatchNormalization", "SplitToSequence", "SequenceAt", "CastLike"}
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes": '["a", "b"]'}
    assert b".py" not in toy_onnx.read_bytes()  # no paths of the machine it was made on


@pytest.fixture(scope="module")
def toy_pt2(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pt2")
    torch.save({"model": toy.state_dict()}, folder / "model.pth")
    report = export_run(get_config(TOY), folder / "toy.pt2", folder / "model.pth", sizes=SIZES[:1])
    assert [difference.size for difference in report.differences] == SIZES[:1]
    return report.path


def test_a_torch_export_file_takes_three_sizes(toy, toy_pt2):
    network, _ = load_program(toy_pt2)
    generator = torch.Generator().manual_seed(6)
    for size in SIZES:
        images = torch.randint(0, 256, (size[0], 3, *size[1:]), generator=generator).float()
        torch.testing.assert_close(network(images), logits_of(toy, images), atol=1e-5, rtol=0)
    operators = {str(node.target) for node in torch.export.load(toy_pt2).graph.nodes}
    assert not any("ccnet_d2" in name for name in operators)
    with zipfile.ZipFile(toy_pt2) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    assert any(b"einsum" in text for text in texts)
    assert not any(b".py" in text for text in texts)  # no paths of the machine it was made on


def test_the_file_of_a_run_names_its_classes(toy_pt2, tmp_path):
    _, metadata = load_program(toy_pt2)
    assert metadata["input_format"] == "RGB"
    names, colors = json.loads(metadata["classes"]), json.loads(metadata["colors"])
    assert len(names) == len(colors) == 4 and all(len(color) == 3 for color in colors)
    with pytest.raises(UserError, match="no weights to export"):
        export_run(get_config(TOY), tmp_path / "toy.pt2")


def test_the_model_is_left_as_it_was(toy):
    attention = toy.sem_seg_head.context
    network = ExportedNetwork(toy)
    assert attention.backend == "auto" and "project" not in vars(attention)
    assert all(parameter.requires_grad for parameter in toy.parameters())
    # The copy is in fp32 and predicts, whatever the model does.
    model = make_model().double().train()
    images = torch.randint(0, 256, (1, 3, 49, 91)).float()
    logits = ExportedNetwork(model)(images)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.equal(logits, network(images))
    assert model.training and all(parameter.dtype == torch.float64 for parameter in model.parameters())


@pytest.mark.parametrize(("align_corners", "padded_by"), [(True, "model"), (False, "backbone")])
def test_the_network_to_be_exported_is_the_model(align_corners, padded_by, monkeypatch):
    model = make_model(TOY, f"model.sem_seg_head.align_corners={align_corners}")
    part = model if padded_by == "model" else type(model.backbone)
    monkeypatch.setattr(part, "size_divisibility", 16)
    for difference in compare(ExportedNetwork(model), model, SIZES):
        assert difference.largest < 1e-5


def test_a_file_that_would_differ_is_not_written(toy, tmp_path):
    class Drifting(type(toy)):
        """Computes something else when it is called than its parts, which are exported, compute."""

        def forward(self, inputs):
            outputs = super().forward(inputs)
            return [{"sem_seg": output["sem_seg"] + 1e-3} for output in outputs]

    model = make_model()
    model.__class__ = Drifting
    path = tmp_path / "folder" / "wrong.pt2"
    with pytest.raises(ExportError, match=r"nothing was written.*\(1x3x64x80: largest difference 1\.0e-03"):
        export_model(model, path, sizes=SIZES[:1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("reach", "relative"), [(0.25, 3e-3), (1.0, 3e-3), (8.0, 3e-3 / 8)])
def test_differences_are_shares_of_logits_above_1(reach, relative):
    assert Difference((1, 64, 80), 3e-3, reach).relative == pytest.approx(relative)


def test_nan_is_not_a_small_difference(toy):
    (difference,) = compare(lambda images: torch.full((1, 4, 64, 80), torch.nan), toy, SIZES[:1])
    assert difference.largest == float("inf") and not difference.relative <= 1e-4
    (difference,) = compare(lambda images: torch.zeros(1, 4, 64, 79), toy, SIZES[:1])
    assert difference.largest == float("inf")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of_file", [0.0, None])
def test_logits_that_are_not_finite_are_no_small_difference(value, of_file):
    """Of the model alone, and of both."""

    def model(inputs):
        return [{"sem_seg": torch.full((4, 64, 80), value)}]

    found = torch.full((1, 4, 64, 80), value if of_file is None else of_file)
    (difference,) = compare(lambda images: found, model, SIZES[:1])
    assert difference.largest == difference.relative == float("inf")


def test_the_images_are_drawn_by_the_seed_alone():
    """As Detectron2 reads them for the model; what is random elsewhere stays as it was."""

    def images_of(seed):
        def model(inputs):
            seen.extend(inputs)
            return [{"sem_seg": item["image"][:1].float()} for item in inputs]

        seen = []
        (difference,) = compare(lambda images: images[:, :1], model, [(2, 33, 40)], seed=seed)
        assert difference.largest == 0 and difference.reach == max(item["image"][0].max() for item in seen)
        assert all((item["height"], item["width"]) == (33, 40) for item in seen)
        assert all(item["image"].dtype == torch.uint8 for item in seen)
        assert {0, 255} <= set(torch.stack([item["image"] for item in seen]).flatten().tolist())
        return torch.stack([item["image"] for item in seen])

    state = torch.get_rng_state()
    first = images_of(0)
    assert torch.equal(images_of(0), first) and not torch.equal(images_of(1), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def export_of(toy, monkeypatch):
    """`export_model` to a file of seven bytes that has these differences."""

    def export_of(largest, path, reach=1.0, **options):
        reaches = (1.0, reach, 1.0)
        differences = [Difference(*figures) for figures in zip(SIZES, largest, reaches, strict=True)]
        monkeypatch.setattr(files, "trace", lambda model: None)
        monkeypatch.setattr(files, "_pt2", lambda program, metadata: (b"content", None))
        monkeypatch.setattr(files, "compare", lambda run, model, sizes: differences)
        return export_model(toy, path, sizes=SIZES, **options)

    return export_of


@pytest.mark.parametrize(
    ("worst", "reach"), [(2e-3, 1.0), (torch.inf, 1.0), (torch.inf, torch.nan), (torch.inf, torch.inf)]
)
def test_the_largest_difference_decides(export_of, tmp_path, worst, reach):
    path = tmp_path / "model.pt2"
    with pytest.raises(ExportError, match=r"nothing was written.*\(3x3x49x91: largest difference"):
        export_of([1e-6, worst, 1e-5], path, reach=reach)
    assert list(tmp_path.iterdir()) == []


def test_the_tolerance_is_the_one_given(export_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ExportError, match="nothing was written"):
        export_of([1e-6, 2e-4, 1e-5], "~/model.pt2")
    report = export_of([1e-6, 2e-4, 1e-5], "~/model.pt2", tolerance=2e-4)
    assert report.path == tmp_path / "model.pt2" and report.size == 7
    assert report.path.read_bytes() == b"content"


def test_a_place_that_cannot_be_written_is_one_sentence(export_of, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    path = tmp_path / "file" / "folder" / "model.pt2"
    with pytest.raises(ExportError, match=rf"^cannot write '{path}': Not a directory\.$"):
        export_of([0, 0, 0], path)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_names_that_are_no_home_and_too_long(export_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(export_of([0, 0, 0], "~nobody's.pt2").path) == "~nobody's.pt2"
    assert [path.name for path in tmp_path.iterdir()] == ["~nobody's.pt2"]
    with pytest.raises(ExportError, match=r"a\.pt2': File name too long\.$"):
        export_of([0, 0, 0], "a" * 300 + ".pt2")


def test_a_program_that_says_nothing_of_itself(tmp_path):
    """As torch writes it."""
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(2),)), tmp_path / "relu.pt2")
    network, metadata = load_program(tmp_path / "relu.pt2")
    assert metadata == {} and network(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]


def test_a_run_s_own_weights_and_what_is_passed_on(toy, tmp_path, monkeypatch):
    torch.save({"model": toy.state_dict()}, tmp_path / "model.pth")
    seen = {}

    def keep(model, path, **options):
        seen.update(options, path=path, model=model)

    monkeypatch.setattr(run, "export_model", keep)
    overrides = [f"train.init_checkpoint={tmp_path / 'model.pth'}", "model.input_format=BGR"]
    cfg = apply_overrides(get_config(TOY), overrides)
    export_run(cfg, "toy.pt2", sizes=SIZES[:1], tolerance=0.25)
    assert (seen["path"], seen["sizes"], seen["tolerance"]) == ("toy.pt2", SIZES[:1], 0.25)
    assert seen["metadata"]["input_format"] == "BGR"
    for name, value in seen["model"].state_dict().items():
        assert torch.equal(value, toy.state_dict()[name]), name
    cfg.dataloader.test.dataset.names = ()  # no data set, and so no names
    export_run(cfg, "toy.pt2")
    assert (seen["sizes"], seen["tolerance"]) == (DEFAULT_SIZES, 1e-4)
    assert seen["metadata"] == {"ccnet_d2": ccnet_d2.__version__, "input_format": "BGR"}


def detectron2_segmentor():
    """Detectron2's own network, which has parts of the same names."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    return build_model(cfg)


def test_what_does_not_export_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_onnx_maker", None)  # packages that would be of no use are not asked for
    detector = instantiate(get_config("coco/mask_rcnn_rcca_R_50_FPN_1x.py").model)
    for model, message in (
        (instantiate(get_config("toy/ranet_synthetic.py").model), "CCNet with RANet's head does not export"),
        (
            instantiate(get_config("camvid/ccnet3d_T1_R_18_D8_half.py").model),
            "CCNet3D does not export: it segments",
        ),
        (detector, "GeneralizedRCNN does not export: detection networks (Mask R-CNN with or without RCCA)"),
        (
            detectron2_segmentor(),
            "SemanticSegmentor with SemSegFPNHead does not export: its head takes other arguments",
        ),
        (
            nn.Conv2d(3, 3, 1),
            "Conv2d does not export: it has no backbone and no sem_seg_head and no pixel_mean",
        ),
    ):
        with pytest.raises(ExportError, match=re.escape(message)):
            export_model(model, tmp_path / "model.onnx")
        with pytest.raises(ExportError, match=re.escape(message)):
            ExportedNetwork(model)
    assert list(tmp_path.iterdir()) == []


class SizeDependent(nn.Module):
    standalone = False

    def forward(self, x):
        return x * 2 if x.shape[-1] > 20 else x


def test_arithmetic_that_depends_on_the_size_is_refused(tmp_path):
    model = make_model()
    model.sem_seg_head.context = SizeDependent()
    message = "CCNet with SizeDependent does not export: its arithmetic depends on the image's size"
    before = logging.root.manager.disable
    with pytest.raises(ExportError, match=message):
        export_model(model, tmp_path / "model.pt2")
    assert logging.root.manager.disable == before  # others are heard again


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("model.tflite", SIZES, "must end in .onnx or .pt2"),
        ("model.onnx", [], "sizes to check on must be"),
        ("model.onnx", [(1, 8, 64)], "sides of at least 32"),
        ("model.onnx", [(1, 64, 31)], "sides of at least 32"),
        ("model.onnx", [(1, 64, 32), (0, 64, 64)], "sizes to check on must be"),
        ("model.pt2", [(1, 64, 2**16 + 1)], "and at most 65536"),
        ("model.pt2", [(1, 2**16 + 1, 64)], "and at most 65536"),
        ("folder.pt2", SIZES, "is a folder: name a file"),
    ],
)
def test_wrong_arguments_are_one_sentence(toy, tmp_path, name, sizes, message):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match=message):
        export_model(toy, tmp_path / name, sizes=sizes)


@pytest.mark.parametrize("tolerance", [-1e-4, float("nan")])
def test_a_tolerance_that_nothing_meets_is_not_the_file_s_fault(toy, tmp_path, tolerance):
    with pytest.raises(ExportError, match=rf"^the tolerance must be 0 or above, got {tolerance:g}\.$"):
        export_model(toy, tmp_path / "model.pt2", sizes=SIZES[:1], tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "suffixes"),
    [
        # The official form: deep stem, ceil_mode, align_corners; mmsegmentation's: neither.
        ("cityscapes/ccnet_R_50_D8_769x769_60k.py", [], [".onnx", ".pt2"]),
        (
            "cityscapes/ccnet_R_50_D8_512x1024_80k.py",
            ["model.sem_seg_head.context=rcca_r3"],
            [".onnx", ".pt2"],
        ),
        ("camvid/ccnet_R_18_D8_half.py", ["model.size_divisibility=32"], [".onnx", ".pt2"]),
        ("quick_schedules/ce2p_ccl_R_18_lip_fixture.py", [], [".onnx"]),
        (TOY, ["model.sem_seg_head.align_corners=True"], [".onnx"]),
        *[
            (TOY, [f"model.sem_seg_head.context={name}"], [".onnx"])
            for name in CONTEXT_MODULES
            if name not in ("rcca", "rcca3d")  # the first is the toy's own, the second for clips
        ],
    ],
)
def test_networks(tmp_path, config, overrides, suffixes):
    model = make_model(config, *overrides)
    for suffix in suffixes:
        if suffix == ".onnx":
            pytest.importorskip("onnxscript")
        report = export_model(model, tmp_path / f"model{suffix}", sizes=SIZES)
        assert len(report.differences) == 3
        for difference in report.differences:
            # The model's channels-last convolutions, up to 18432 products an output, round more than the file's: with
            # random weights up to 4e-4 from float64 at logits of 12, the file 3e-5.
            assert difference.largest <= max(1e-4, 5e-5 * difference.reach)
            assert difference.reach > 1e-2
