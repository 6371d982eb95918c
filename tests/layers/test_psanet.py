import pytest
import torch
import torch.nn.functional as F

from ccnet_d2.layers.psanet import PSANet


def by_loops(features, mask, side, collect):
    """features (C, h, w), mask (side^2, h, w): attention of every target over the sources within the mask."""
    half = side // 2
    height, width = features.shape[1:]
    out = torch.zeros_like(features)
    for y in range(height):
        for x in range(width):
            logits, values = [], []
            for v in range(height):
                for u in range(width):
                    # collect: the target predicts where sources lie; distribute: the reverse.
                    dy, dx = (v - y, u - x) if collect else (y - v, x - u)
                    if abs(dy) > half or abs(dx) > half:
                        continue
                    channel = (dy + half) * side + dx + half
                    logits.append(mask[channel, y, x] if collect else mask[channel, v, u])
                    values.append(features[:, v, u])
            out[:, y, x] = torch.stack(values, dim=1) @ torch.stack(logits).softmax(0)
    return out


@pytest.mark.parametrize("size", [(3, 4), (7, 5), (1, 1)])
@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("side", [3, 7, 13])
def test_against_loops(size, shrink, side):
    torch.manual_seed(0)
    module = PSANet(6, 4, mask_size=side, shrink_factor=shrink, norm="", activation="").double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    small = [(n - 1) // shrink + 1 for n in size]

    def resize(y, to):
        return F.interpolate(y, to, mode="bilinear", align_corners=True)

    def pointwise(block, y):
        return (
            torch.einsum("oc,bchw->bohw", block.conv.weight[:, :, 0, 0], y) + block.conv.bias[:, None, None]
        )

    parts = []
    for name in ("collect", "distribute"):
        y = resize(pointwise(getattr(module, f"{name}_reduce"), x), small)
        hidden, last = getattr(module, f"{name}_mask")
        mask = torch.einsum("oc,bchw->bohw", last.weight[:, :, 0, 0], pointwise(hidden, y))
        parts.append(
            torch.stack([by_loops(f, m, side, name == "collect") for f, m in zip(y, mask, strict=True)])
        )
    context = resize(pointwise(module.project, torch.cat(parts, dim=1)), size)
    fuse = module.fuse.conv
    expected = F.conv2d(torch.cat([x, context], dim=1), fuse.weight, fuse.bias, padding=1)
    torch.testing.assert_close(module(x), expected)


def test_collect_and_distribute_differ():
    torch.manual_seed(0)
    module = PSANet(4, mask_size=5, shrink_factor=1, norm="").double()
    module.distribute_reduce.load_state_dict(module.collect_reduce.state_dict())
    module.distribute_mask.load_state_dict(module.collect_mask.state_dict())
    seen = []
    module.project.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    module(5 * torch.randn(1, 4, 3, 3, dtype=torch.float64))
    collected, distributed = seen[0].chunk(2, dim=1)
    assert not torch.allclose(collected, distributed)


def test_the_mask_bounds_the_reach():
    torch.manual_seed(0)
    module = PSANet(2, mask_size=3, shrink_factor=1, norm="", activation="").double()
    reduced = []
    module.project.register_forward_pre_hook(lambda _, arguments: reduced.append(arguments[0]))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    module(x)
    reduced[0][0, :, 2, 3].sum().backward()
    reached = x.grad[0].abs().sum(0) > 0
    assert reached[1:4, 2:5].all() and reached.sum() == 9


def test_errors():
    with pytest.raises(ValueError, match="mask_size must be odd and at least 1, got 96"):
        PSANet(4, mask_size=96)
    with pytest.raises(ValueError, match="shrink_factor must be at least 1, got 0"):
        PSANet(4, shrink_factor=0)
