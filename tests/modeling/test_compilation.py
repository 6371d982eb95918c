"""torch.compile: whole models as one graph, equal to the model, and not compiled again for other image sizes."""

import pytest
import torch
from detectron2.config import instantiate
from torch._dynamo.utils import counters

from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.layers import CrissCrossAttention
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling.compilation import compile_model

TOY = "toy/ccnet_synthetic.py"
SIZES = [(64, 96), (96, 80), (57, 91)]


@pytest.fixture(autouse=True)
def recompiling_is_an_error():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def make_model(config=TOY, *overrides):
    torch.manual_seed(0)
    model = instantiate(apply_overrides(get_config(config), ["model.sem_seg_head.norm=BN", *overrides]).model)
    for module in model.modules():
        if isinstance(module, CrissCrossAttention):
            module.gamma.data.fill_(0.7)
    return model


def make_batch(height, width, classes, count=2):
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count, height, width), generator=generator)
    return [
        {"image": image, "sem_seg": label, "height": height, "width": width}
        for image, label in zip(images, labels, strict=True)
    ]


def check_inference(model, reference, tolerance):
    model.eval(), reference.eval()
    for size in SIZES:
        batch = make_batch(*size, 4)
        with torch.no_grad():
            for got, wanted in zip(model(batch), reference(batch), strict=True):
                torch.testing.assert_close(got["sem_seg"], wanted["sem_seg"], atol=tolerance, rtol=tolerance)


def check_training(model, reference, classes, tolerance):
    model.train(), reference.train()
    for size in SIZES:
        losses = []
        for one in (model, reference):
            one.zero_grad()
            torch.manual_seed(0)
            loss = sum(one(make_batch(*size, classes)).values())
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], atol=tolerance, rtol=tolerance)
        for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
            scale = max(wanted.grad.abs().max().item(), 1e-6)
            torch.testing.assert_close(got.grad / scale, wanted.grad / scale, atol=100 * tolerance, rtol=0)


def test_the_model_is_one_graph_for_all_sizes():
    """What torch's tracer makes of it; what its compiler makes of that is in the slow tests."""
    model = compile_model(make_model(), fullgraph=True, backend="eager")
    check_inference(model, make_model(), 1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()  # training is another graph than inference
    counters.clear()
    check_training(model, make_model(), 4, 1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_model_keeps_its_names_and_can_be_copied():
    import copy

    model = make_model()
    names = list(model.state_dict())
    assert compile_model(model) is model
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)  # as the predictor's and the exporter's copies: not compiled
    check_inference(copied, make_model(), 1e-6)
    assert counters["stats"]["unique_graphs"] == 0


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler on the CPU and there is none"):
        compile_model(make_model())
    compile_model(make_model(), backend="aot_eager")


def test_a_run_and_the_predictor_compile_when_asked(tmp_path):
    from ccnet_d2.engine import build_model
    from ccnet_d2.inference import Predictor

    cfg = apply_overrides(get_config(TOY), ["train.device=cpu"])
    assert build_model(cfg)._compiled_call_impl is None
    weights = tmp_path / "model.pth"
    torch.save({"model": make_model().state_dict()}, weights)
    assert Predictor(cfg, weights).model._compiled_call_impl is None
    assert Predictor(cfg, weights, compile=True).model._compiled_call_impl is not None
    cfg = apply_overrides(cfg, ["train.compile=True"])
    assert build_model(cfg)._compiled_call_impl is not None
    assert Predictor(cfg, weights).model._compiled_call_impl is not None
    assert Predictor(cfg, weights, compile=False).model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "classes", "training"),
    [
        (TOY, [], 4, False),
        (TOY, [], 4, True),
        (TOY, ["model.sem_seg_head.context=rcca_r3", "model.sem_seg_head.align_corners=True"], 4, False),
        (
            TOY,
            ["model.sem_seg_head.loss=ohem"],
            4,
            True,
        ),
        ("camvid/ccnet_R_18_D8_half.py", [], 11, False),
        # ceil_mode in the stem, whose size turns on even and odd.
        (
            "camvid/ccnet_R_50_D8_504x504.py",
            ["model.backbone.norm=BN", "model.backbone.depth=18"],
            11,
            False,
        ),
    ],
)
def test_compiled_by_inductor(config, overrides, classes, training):
    model = compile_model(make_model(config, *overrides), fullgraph=True)
    reference = make_model(config, *overrides)
    if training:
        check_training(model, reference, classes, 1e-4)
    else:
        check_inference(model, reference, 1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_training_under_autocast():
    model = compile_model(make_model(), fullgraph=True).train()
    reference = make_model().train()
    for size in SIZES:
        losses = []
        for one in (model, reference):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = sum(one(make_batch(*size, 4)).values())
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], atol=0.02, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
