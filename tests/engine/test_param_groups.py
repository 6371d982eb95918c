"""Parameters with one setting make one group, and train as they did."""

import pytest
import torch
from torch import nn

from ccnet_d2.engine.param_groups import merge_param_groups


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1))


def per_parameter_groups(net):
    """As Detectron2 0.5 makes them, without weight decay for biases."""
    return [
        {"params": [value], "lr": 0.1, "weight_decay": 0.0 if name.endswith("bias") else 0.5}
        for name, value in net.named_parameters()
    ]


def test_groups_by_setting():
    net = network()
    optimizer = torch.optim.AdamW(per_parameter_groups(net))
    merge_param_groups(optimizer)
    weights, biases = optimizer.param_groups
    assert [id(p) for p in weights["params"]] == [id(layer.weight) for layer in net]
    assert [id(p) for p in biases["params"]] == [id(layer.bias) for layer in net]
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_training_is_the_same(make):
    nets = network(), network()
    optimizers = [make(per_parameter_groups(net)) for net in nets]
    merge_param_groups(optimizers[1])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def test_groups_with_state_are_left():
    net = network()
    optimizer = torch.optim.SGD(per_parameter_groups(net), momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="has made steps"):
        merge_param_groups(optimizer)
