"""torch.compile: whole models as one graph, equal to the model, and not compiled again for other image sizes."""

import pytest
import torch
from detectron2.config import instantiate
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from ccnet_d2.engine import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.layers import CrissCrossAttention
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling.compilation import compile_model
from ccnet_d2.ops import available_backends

TOY = "toy/ccnet_synthetic.py"
SIZES = [(64, 96), (96, 80), (57, 91)]


@pytest.fixture(autouse=True)
def recompiling_is_an_error():
    torch._dynamo.reset()
    counters.clear()
    # Random numbers as without the compiler, so that the dropout is the same.
    with torch._dynamo.config.patch(error_on_recompile=True), inductor.patch(fallback_random=True):
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


def check_training(model, reference, classes, tolerance, sizes=SIZES):
    """A step of SGD on each size: losses, every parameter's gradient, and the running statistics at the end."""
    both = (model.train(), reference.train())
    optimizers = [torch.optim.SGD(one.parameters(), 1e-3) for one in both]
    for size in sizes:
        losses = []
        for one, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(0)  # of the dropout
            loss = sum(one(make_batch(*size, classes)).values())
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], atol=tolerance, rtol=tolerance)
        for (name, wanted), got in zip(reference.named_parameters(), model.parameters(), strict=True):
            scale = max(wanted.grad.norm().item(), 1e-6)
            assert (got.grad - wanted.grad).norm().item() / scale <= 100 * tolerance, (size, name)
        for optimizer in optimizers:
            optimizer.step()
    for got, wanted in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(got, wanted, atol=100 * tolerance, rtol=100 * tolerance)


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
    compiler = tmp_path / "own"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    compile_model(make_model())


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


R_18 = "camvid/ccnet_R_18_D8_half.py"
# The stem's pool has ceil_mode, so that its size turns on even and odd.
CEIL_MODE = ("camvid/ccnet_R_50_D8_504x504.py", ["model.backbone.norm=BN", "model.backbone.depth=18"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "classes"),
    [
        (TOY, [], 4),
        (TOY, ["model.sem_seg_head.context=rcca_r3", "model.sem_seg_head.align_corners=True"], 4),
        (TOY, ["model.sem_seg_head.context=psp"], 4),
        (TOY, ["model.sem_seg_head.context=asymmetric_nl"], 4),
        (R_18, [], 11),
        (*CEIL_MODE, 11),
    ],
)
def test_compiled_inference(config, overrides, classes):
    model = compile_model(make_model(config, *overrides), fullgraph=True)
    check_inference(model, make_model(config, *overrides), 1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "classes", "backend", "dynamic", "dtype"),
    [
        (TOY, [], 4, "compiled", True, torch.float32),
        (TOY, ["model.sem_seg_head.loss=ohem"], 4, "compiled", True, torch.float32),
        (TOY, ["model.sem_seg_head.context=rcca_recompute"], 4, "compiled", True, torch.float32),
        (TOY, [], 4, "matmul", None, torch.float32),
        # In float64, where two orders of a sum are no excuse for anything.
        (R_18, [], 11, "compiled", True, torch.float64),
        (R_18, ["model.sem_seg_head.loss=ohem"], 11, "compiled", True, torch.float64),
        (*CEIL_MODE, 11, "compiled", True, torch.float64),
    ],
)
def test_compiled_training(config, overrides, classes, backend, dynamic, dtype):
    """Any sizes with the compiled op; one size with matmul, see `compile_model`."""
    if backend == "compiled" and available_backends()["compiled"]:
        pytest.skip(available_backends()["compiled"])
    both = make_model(config, *overrides), make_model(config, *overrides)
    for module in (module for model in both for module in model.to(dtype).modules()):
        if isinstance(module, CrissCrossAttention):
            module.backend = backend
    model = compile_model(both[0], dynamic=dynamic, fullgraph=True)
    sizes = SIZES if dynamic else [SIZES[0]] * 3
    check_training(model, both[1], classes, 1e-4 if dtype == torch.float32 else 1e-9, sizes)
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
