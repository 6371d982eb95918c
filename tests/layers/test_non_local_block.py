"""The non-local block of detection backbones, against its formula written out and against torch's attention."""

import pytest
import torch
import torch.nn.functional as F

from ccnet_d2.layers import RCCA
from ccnet_d2.layers.non_local_block import NonLocalBlock


def block(channels=16, **options):
    torch.manual_seed(0)
    module = NonLocalBlock(channels, **options)
    last = module.out if module.norm is None else module.norm
    torch.nn.init.normal_(last.weight)
    return module.eval()


def by_formula(module, x):
    """Every position one by one; theta, phi, g are the thirds of `qkv`."""
    weights, biases = module.qkv.weight.flatten(1).chunk(3), module.qkv.bias.chunk(3)
    n, _, height, width = x.shape
    positions = x.flatten(2)
    theta, phi, g = (
        torch.einsum("kc,ncp->nkp", w, positions) + b[:, None] for w, b in zip(weights, biases, strict=True)
    )
    y = torch.stack(
        [
            torch.stack(
                [
                    sum(w * g[i, :, q] for q, w in enumerate((phi[i].T @ theta[i, :, p]).softmax(0)))
                    for p in range(height * width)
                ],
                dim=1,
            )
            for i in range(n)
        ]
    )
    z = module.out(y.reshape(n, -1, height, width))
    return x + (z if module.norm is None else module.norm(z))


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("norm", ["BN", "GN", ""])
def test_is_the_formula(backend, norm):
    module = block(norm=norm, backend=backend)
    x = torch.randn(2, 16, 3, 4)
    torch.testing.assert_close(module(x), by_formula(module, x), atol=1e-5, rtol=1e-5)


def test_second_loop_shares_the_weights():
    once, twice = block(recurrence=1), block(recurrence=2)
    x = torch.randn(1, 16, 3, 4)
    torch.testing.assert_close(twice(x), once(once(x)))
    assert len(list(once.parameters())) == len(list(twice.parameters()))


@pytest.mark.parametrize("norm", ["BN", "GN", ""])
@pytest.mark.parametrize("training", [True, False])
def test_starts_as_the_identity_and_learns(norm, training):
    module = NonLocalBlock(16, norm=norm).train(training)
    x = torch.randn(2, 16, 5, 6)
    assert torch.equal(module(x), x)
    F.mse_loss(module(x), torch.randn_like(x)).backward()
    last = module.out if norm == "" else module.norm
    assert last.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in module.parameters())


def test_parameters_of_the_published_block():
    """1024 channels in res4: theta, phi, g to 512 and W back, one norm; RCCA has a good half of that."""
    module = NonLocalBlock(1024)
    expected = 3 * (1024 * 512 + 512) + 512 * 1024 + 2 * 1024
    assert sum(p.numel() for p in module.parameters()) == expected
    assert sum(p.numel() for p in RCCA(1024).parameters()) < 0.65 * expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 15}, "channels=15"),
        ({"channels": 16, "recurrence": 0}, "recurrence must be at least 1 and whole, got 0"),
        ({"channels": 16, "norm": "LN"}, "unknown norm 'LN'"),
        ({"channels": 16, "backend": "cuda"}, "backend='cuda' is not one of"),
        ({"channels": 16, "norm": lambda c: torch.nn.BatchNorm2d(c, affine=False)}, "no learned scale"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(**options)


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_an_empty_batch_stays_empty(backend):
    assert block(backend=backend)(torch.randn(0, 16, 3, 4)).shape == (0, 16, 3, 4)
