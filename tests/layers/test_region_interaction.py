"""Collection, interaction and distribution against Eq. 6 to 8 pixel by pixel, with gradients, and the odd cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccnet_d2.layers import RegionAttention
from ccnet_d2.layers.region_attention import assign, pair_grid
from ccnet_d2.layers.region_construction import Regions
from ccnet_d2.layers.region_interaction import (
    Assignment,
    collect,
    distribute,
    interact,
    region_interaction,
)


def example(representatives: list[int] = [0, 3, 2, 7, 8]) -> tuple[Tensor, Assignment]:  # noqa: B006
    """Nine pixels in three regions, of which the last is a single pixel."""
    torch.manual_seed(0)
    features = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    region = torch.tensor([0, 0, 1, 0, 0, 1, 1, 1, 2])
    score = torch.rand(9, dtype=torch.float64, requires_grad=True)
    return features, Assignment(region, score, torch.tensor(representatives))


def softmax(energies: list[Tensor]) -> list[Tensor]:
    total = sum((e.exp() for e in energies), torch.zeros((), dtype=torch.float64))
    return [e.exp() / total for e in energies]


def eq6(a: Tensor, where: Assignment) -> Tensor:
    j, phi = where.score, where.representatives.tolist()
    out = []
    for p in phi:
        others = [i for i in range(len(a)) if where.region[i] == where.region[p] and i not in phi]
        weights = softmax([a[p] @ (j[i] * a[i]) for i in others])
        out.append(j[p] * a[p] + sum(w * j[i] * a[i] for w, i in zip(weights, others, strict=True)))
    return torch.stack(out)


def eq7(local: Tensor, where: Assignment, normalization: str) -> Tensor:
    phi = where.representatives.tolist()
    region, j = where.region[phi].tolist(), where.score[phi]
    out = []
    for p in range(len(phi)):
        total = j[p] * local[p]
        elsewhere = [i for i in range(len(phi)) if region[i] != region[p]]
        groups = [elsewhere]
        if normalization == "region":
            groups = [[i for i in elsewhere if region[i] == s] for s in sorted(set(region))]
        for group in groups:
            weights = softmax([local[p] @ (j[i] * local[i]) for i in group])
            total = total + sum(w * j[i] * local[i] for w, i in zip(weights, group, strict=True))
        out.append(total)
    return torch.stack(out)


def eq8(a: Tensor, context: Tensor, where: Assignment) -> Tensor:
    phi, j = where.representatives.tolist(), where.score
    out = []
    for i in range(len(a)):
        own = [k for k, p in enumerate(phi) if where.region[p] == where.region[i]]
        weights = softmax([a[i] @ (j[phi[k]] * context[k]) for k in own])
        out.append(j[i] * a[i] + sum(w * j[phi[k]] * context[k] for w, k in zip(weights, own, strict=True)))
    return torch.stack(out)


def check(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    weights = torch.rand_like(found)
    grads = (torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (found, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_collection_is_equation_6():
    features, where = example()
    check(collect(features, where), eq6(features, where), features, where.score)


@pytest.mark.parametrize("normalization", ["region", "others"])
def test_interaction_is_equation_7(normalization):
    _, where = example()
    local = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    found = interact(local, where, normalization=normalization)
    check(found, eq7(local, where, normalization), local, where.score)


def test_distribution_is_equation_8():
    features, where = example()
    context = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    found = distribute(features, context, where)
    check(found, eq8(features, context, where), features, context, where.score)


def test_all_three_and_the_ablations():
    features, where = example()
    j, phi = where.score, where.representatives
    expected = eq8(features, eq7(eq6(features, where), where, "region"), where)
    check(region_interaction(features, where), expected, features, where.score)
    # Without the exchange between regions.
    expected = eq8(features, j[phi, None] * eq6(features, where), where)
    check(region_interaction(features, where, inter=False), expected, features, where.score)
    # Without communication inside of regions only representatives change.
    found = region_interaction(features, where, intra=False)
    context = eq7(j[phi, None] * features[phi], where, "region")
    expected = j[:, None] * features
    expected = torch.stack(
        [
            row + (j[i] * context[phi.tolist().index(i)] if i in phi.tolist() else 0)
            for i, row in enumerate(expected)
        ]
    )
    check(found, expected, features, where.score)


def test_a_single_region_has_nobody_to_talk_to():
    features, where = example()
    where = where._replace(region=torch.zeros_like(where.region))
    local = collect(features, where)
    for normalization in ("region", "others"):
        found = interact(local, where, normalization=normalization)
        torch.testing.assert_close(found, where.score[where.representatives][:, None] * local)


def test_regions_without_other_pixels_collect_nothing():
    features, where = example(representatives=list(range(9)))  # K as large as the regions
    found = collect(features, where)
    torch.testing.assert_close(found, where.score[:, None] * features)
    found.sum().backward()
    assert features.grad.isfinite().all() and where.score.grad.isfinite().all()


def test_large_energies_do_not_overflow():
    features, where = example()
    features = (features.detach().float() * 1e3).requires_grad_()
    where = where._replace(score=where.score.detach().float().requires_grad_())
    out = region_interaction(features, where)
    out.sum().backward()
    assert out.isfinite().all() and features.grad.isfinite().all() and where.score.grad.isfinite().all()


@pytest.mark.parametrize(
    ("size", "cells", "expected"),
    [
        ((97, 97), 49 * 49, (49, 49)),
        ((65, 65), 49 * 49, (49, 49)),
        ((33, 49), 49 * 49, (33, 49)),
        ((128, 256), 49 * 49, (34, 68)),
        ((5, 300), 100, (1, 60)),
        ((300, 5), 100, (77, 1)),
        ((9, 9), 1, (1, 1)),
    ],
)
def test_pair_grid(size, cells, expected):
    rows, columns = pair_grid(size, cells)
    assert (rows, columns) == expected
    assert rows * columns <= cells and rows <= size[0] and columns <= size[1]


def test_pixels_take_region_and_score_of_their_cell():
    regions = Regions((2, 3), torch.tensor([0, 0, 1, 2, 2, 1]), torch.arange(6) / 10, torch.tensor([1, 2, 3]))
    where = assign(regions, (5, 9))
    region = where.region.reshape(5, 9)
    rows = [0, 0, 1, 1, 1]  # the middle of the third row lies on the border: it goes to the next
    columns = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for y in range(5):
        for x in range(9):
            cell = rows[y] * 3 + columns[x]
            assert region[y, x] == regions.region[cell]
            assert where.score.reshape(5, 9)[y, x] == regions.score[cell]
    assert where.representatives.tolist() == [1 * 9 + 4, 1 * 9 + 7, 3 * 9 + 1]


def maps(size: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(batch, 8, *size, requires_grad=True)
    boundary = 0.4 * torch.rand(batch, *size)
    semantic = (4 * torch.randn(batch, 3, *size)).softmax(1)
    return features, boundary.requires_grad_(), semantic.requires_grad_()


def test_attention_is_construction_then_interaction():
    features, boundary, semantic = maps((4, 6))
    attention = RegionAttention(8, representatives=2, map_gradients=True)
    out = attention(features, boundary, semantic)
    regions = attention.construction(boundary, semantic)
    for image, own in enumerate(regions):
        where = Assignment(own.region, own.score, own.representatives)
        expected = region_interaction(features[image].flatten(1).t(), where)
        torch.testing.assert_close(out[image].flatten(1).t(), expected)
    out.sin().sum().backward()
    for x in (features, boundary, semantic, attention.construction.kernel_weights):
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_a_coarser_grid_gives_the_same_where_the_map_is_made_of_its_cells():
    features, boundary, semantic = maps((3, 4), batch=1)
    fine = [x.repeat_interleave(3, -1).repeat_interleave(3, -2) for x in (features, boundary, semantic)]
    # Each cell of 3x3 pixels counts as one, so a region's other pixels are the same mean nine times over - but for
    # the middle ones, which represent them: with one region for each cell, nothing but the middle is left.
    attention = RegionAttention(8, representatives=1, pair_cells=12, threshold=2.0)
    coarse = RegionAttention(8, representatives=1, threshold=2.0)
    out, expected = attention(*fine), coarse(features, boundary, semantic)
    regions = attention.construction(boundary, semantic)[0]
    assert len(regions.region.unique()) == 12  # nothing lies above a threshold of 2
    middle = out[..., 1::3, 1::3]
    score = regions.score.reshape(1, 1, 3, 4)
    # A^l has the eight other pixels besides, all the same, so a second J A.
    local = 2 * score * features
    where = Assignment(regions.region, regions.score, regions.representatives)
    context = interact(local[0].flatten(1).t(), where).t().reshape(1, 8, 3, 4)
    torch.testing.assert_close(middle, score * features + score * context)
    assert expected.shape == features.shape


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("case", ["one class", "boundary everywhere", "one pixel", "noise"])
def test_odd_maps_train_without_nan(variant, case):
    size = (1, 1) if case == "one pixel" else (5, 7)
    features, boundary, semantic = maps(size)
    if case == "one class":
        semantic = F.one_hot(torch.zeros(2, *size, dtype=torch.long), 3).permute(0, 3, 1, 2).float()
        semantic.requires_grad_()
        boundary = torch.zeros(2, *size, requires_grad=True)
    elif case == "boundary everywhere":
        boundary = torch.ones(2, *size, requires_grad=True)
    attention = RegionAttention(8, variant=variant, pair_cells=20).train()
    out = attention(features, boundary, semantic)
    assert out.shape == features.shape and out.isfinite().all()
    out.sin().sum().backward()
    for x in (features, boundary, semantic, *attention.parameters()):
        assert x.grad is None or x.grad.isfinite().all()
    if case == "boundary everywhere" and variant == "paper":
        assert (out == 0).all()  # every J is 0, so nothing is passed on
    else:
        assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"variant": "code"}, {"pair_cells": 4}, {"use_boundary": False}])
def test_an_empty_batch_stays_empty(options):
    features, boundary, semantic = (x.detach()[:0].requires_grad_() for x in maps((4, 5)))
    attention = RegionAttention(8, **options).train()
    out = attention(features, boundary, semantic)
    assert out.shape == (0, 8, 4, 5)
    out.sum().backward()
    assert features.grad.shape == features.shape
    assert all((parameter.grad == 0).all() for parameter in attention.parameters())


def test_half_precision_is_computed_in_full():
    features, boundary, semantic = maps((4, 5))
    attention = RegionAttention(8)
    expected = attention(features.bfloat16().float(), boundary, semantic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(features.bfloat16(), boundary, semantic)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16())


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_another_dtype(variant, dtype):
    """As `model.half()` makes them: the convolutions run in it, the steps between them in fp32 at least."""
    torch.manual_seed(0)
    attention, inputs = RegionAttention(8, variant=variant).eval(), maps((4, 5))
    expected = attention(*inputs)
    found = attention.to(dtype)(*(x.to(dtype) for x in inputs))
    assert found.dtype == dtype
    assert (found - expected).norm() <= 0.05 * expected.norm()
    found.sum().backward()
    assert inputs[0].grad.isfinite().all()


def test_code_interaction_by_hand():
    """The released code's three steps, with its convolutions as they are."""
    features, boundary, semantic = maps((4, 5), batch=1)
    attention = RegionAttention(8, variant="code", representatives=2).eval()
    out = attention(features, boundary, semantic)
    net = attention.interaction
    (regions,) = attention.construction(boundary, semantic)
    j, phi = regions.score, sorted(regions.representatives.tolist())
    query, value = (c(features)[0].flatten(1).t() for c in (net.query, net.value))

    def on_list(convolution, rows: list[Tensor]) -> list[Tensor]:
        # A map of one column: of the kernel's columns only the middle one meets it.
        x = torch.stack(rows)
        kernel = convolution.conv.weight[..., 1]
        x = F.conv1d(x.t()[None], kernel, padding=1) / math.sqrt(1 + 1e-5)  # a fresh norm in eval mode
        return list(x[0].t().relu())

    local = []
    for p in phi:
        weights = torch.stack([value[p] @ (j[i] * value[i]) for i in range(20)]).softmax(0)
        local.append(value[p] + sum(weights[i] * value[i] for i in range(20)))
    local = on_list(net.collect, local)
    context = []
    for p in range(len(phi)):
        weights = torch.stack([local[p] @ (j[phi[k]] * local[k]) for k in range(len(phi))]).softmax(0)
        context.append(local[p] + sum(weights[k] * local[k] for k in range(len(phi))))
    context = on_list(net.interact, context)
    pixels = []
    for i in range(20):
        weights = torch.stack([query[i] @ (j[phi[k]] * context[k]) for k in range(len(phi))]).softmax(0)
        pixels.append(query[i] + sum(weights[k] * context[k] for k in range(len(phi))))
    expected = net.distribute(torch.stack(pixels).t().reshape(1, 8, 4, 5))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_code_variant_trains_on_a_lone_representative():
    """Batch norm of one vector is its bias, here 0: what is passed on is nothing, and each pixel keeps its query."""
    features, _, semantic = maps((4, 5), batch=1)
    attention = RegionAttention(8, variant="code", representatives=1, use_boundary=False).train()
    alike = semantic[:, :, :1, :1].detach().expand_as(semantic)
    (regions,) = attention.construction(torch.zeros(1, 4, 5), alike)
    assert regions.representatives.tolist() == [0]
    out = attention(features, torch.zeros(1, 4, 5), alike)
    net = attention.interaction
    torch.testing.assert_close(out, net.distribute(net.query(features)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_cells": 0}, "pair_cells must be at least 1"),
        ({"normalization": "all"}, "normalization='all' is not one of 'region', 'others'"),
        ({"variant": "code", "inter": False}, "ablations of variant='paper'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        RegionAttention(8, **options)
