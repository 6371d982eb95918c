"""Label maps with nothing in them, one pixel of a class, or one class: finite losses and gradients."""

import pytest
import torch
from detectron2.config import instantiate

from ccnet_d2.engine.non_finite_search import all_finite, gradients_are_finite
from ccnet_d2.engine.overrides import apply_overrides
from ccnet_d2.model_zoo import get_config

VOID, SIZE = 255, 24


def labels(kind: str) -> list[torch.Tensor]:
    """Two label maps, (H, W) long."""
    void = torch.full((SIZE, SIZE), VOID)
    mixed = torch.arange(SIZE * SIZE).reshape(SIZE, SIZE) // 7 % 4
    if kind == "all ignored":
        return [void, void.clone()]
    if kind == "one image ignored":
        return [void, mixed]
    if kind == "one pixel":
        single = void.clone()
        single[5, 7] = 2
        return [void, single]
    if kind == "one pixel of a class":
        single = torch.zeros_like(void)
        single[5, 7] = 3
        return [single, torch.zeros_like(void)]
    assert kind == "one class"
    return [torch.ones_like(void), torch.ones_like(void)]


KINDS = ("all ignored", "one image ignored", "one pixel", "one pixel of a class", "one class")
LOSSES = {
    "cross entropy": [],
    "OHEM": ["model.sem_seg_head.loss=ohem"],
    "category consistent": ["model.sem_seg_head.category_consistent=piecewise"],
    "quadratic": ["model.sem_seg_head.category_consistent=quadratic"],
    "auxiliary head": ["model.sem_seg_head.aux_feature=conv"],
}


def batch(kind: str, factor: int = 1) -> list[dict]:
    """Two images with such label maps, a whole number of times as large."""
    torch.manual_seed(1)
    side = SIZE * factor
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    maps = [label.repeat_interleave(factor, 0).repeat_interleave(factor, 1) for label in labels(kind)]
    return [
        {"image": image, "sem_seg": label, "height": side, "width": side}
        for image, label in zip(images, maps, strict=True)
    ]


def build(overrides: list[str]) -> torch.nn.Module:
    """The toy network in training mode."""
    torch.manual_seed(0)
    config = apply_overrides(
        get_config("toy/ccnet_synthetic.py"), ["model.sem_seg_head.channels=16", *overrides]
    )
    return instantiate(config.model).train()


def assert_finite(model: torch.nn.Module, data: list[dict], *, autocast: bool = False) -> dict[str, float]:
    """Losses and gradients are finite and every parameter has one; the losses."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = model(data)
    assert all_finite(losses), losses
    sum(losses.values()).backward()
    assert gradients_are_finite(model)
    lacking = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not lacking, "DistributedDataParallel would wait for these gradients"
    return {name: float(value.detach()) for name, value in losses.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_finite(kind, loss, autocast):
    model = build(LOSSES[loss])
    # As far as in training, where attention takes part.
    model.sem_seg_head.context.gamma.data.fill_(0.5)
    losses = assert_finite(model, batch(kind), autocast=autocast)
    if kind == "all ignored":
        assert not any(losses.values()), losses
    else:
        assert sum(losses.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_ranet(kind, variant):
    torch.manual_seed(0)
    options = ["model.sem_seg_head.channels=16", f"model.sem_seg_head.variant={variant}"]
    assert_finite(
        instantiate(apply_overrides(get_config("toy/ranet_synthetic.py"), options).model).train(), batch(kind)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["null", "piecewise"])
def test_ce2p(kind, loss):
    torch.manual_seed(0)
    options = ["depth=18", "stem=basic", "norm=BN"]
    widths = ["channels=16", "decoder_channels=16", "fine_channels=8", "edge_channels=8"]
    overrides = [f"model.backbone.{option}" for option in options]
    overrides += [f"model.sem_seg_head.{option}" for option in [*widths, f"category_consistent={loss}"]]
    config = apply_overrides(get_config("lip/ce2p_R_101_D16_473x473_115k.py"), overrides)
    assert_finite(instantiate(config.model).train(), batch(kind, factor=2))
