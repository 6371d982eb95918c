"""No loss needs what CUDA refuses to do under `torch.use_deterministic_algorithms(True)`.

There is no GPU here to refuse it, so the operations are watched. Which they are is torch's own list, in the
documentation of that function.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ccnet_d2.losses import (
    BoundaryLoss,
    CategoryConsistentLoss,
    CrossEntropy,
    EdgeCrossEntropy,
    OHEMCrossEntropy,
)

aten = torch.ops.aten
# Upsampling is none of them: `interpolate` takes another way on a GPU then.
REFUSED = {
    aten._adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward,
    aten.reflection_pad2d_backward,
    aten.put_,
    aten.histc,
    aten.grid_sampler_2d_backward,
}
REFUSED_UNLESS_UNREDUCED = {aten.nll_loss_forward, aten.nll_loss2d_forward}


class Watch(TorchDispatchMode):
    """Names of the operations that CUDA would have refused."""

    def __init__(self):
        super().__init__()
        self.refused = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        # nll_loss*_forward(input, target, weight, reduction, ignore_index); reduction 0 is "none".
        if packet in REFUSED or (packet in REFUSED_UNLESS_UNREDUCED and args[3] != 0):
            self.refused.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_torchs_own_sum():
    logits, target = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    with Watch() as watch:
        torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    assert watch.refused


@pytest.mark.parametrize(
    ("loss", "channels"),
    [
        (CrossEntropy(), 2),
        (CrossEntropy(class_weight=[1.0, 2.0]), 2),
        (OHEMCrossEntropy(min_kept=64), 2),
        (OHEMCrossEntropy(min_kept=10, factor=1), 2),
        (EdgeCrossEntropy(), 2),
        (CategoryConsistentLoss(), 16),
        (BoundaryLoss(), 1),
        (BoundaryLoss(resolution="map"), 1),
    ],
)
def test_nothing_is_refused(loss, channels):
    torch.manual_seed(0)
    logits = torch.randn(2, channels, 3, 4, requires_grad=True)
    target = torch.randint(0, 2, (2, 24, 32))
    target[:, :3] = 255
    with Watch() as watch:
        loss(logits, target).backward()
    assert logits.grad.abs().sum() > 0
    assert watch.refused == []
