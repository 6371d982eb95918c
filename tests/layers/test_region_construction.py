"""Regions: SciPy's connected components on drawn maps, Eq. 3 to 5 pixel by pixel, and the odd cases."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from ccnet_d2.layers import RegionConstruction
from ccnet_d2.layers.region_lines import line_maximum
from ccnet_d2.layers.region_partition import (
    connected_regions,
    join_small_regions,
    pointer_regions,
    representatives,
)
from ccnet_d2.layers.region_similarity import binary_jensen_shannon
from ccnet_d2.layers.region_smoothing import smooth_maps


def drawn(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(h, w) classes and boundary mask of a drawn map."""
    classes = np.zeros((12, 14), int)
    boundary = np.zeros((12, 14), bool)
    if name == "blocks":
        classes[:6, 7:], classes[6:, :7], classes[6:, 7:] = 1, 2, 0
    elif name == "two objects of one class":
        classes[2:5, 2:6] = classes[7:11, 8:13] = 1
    elif name == "same class behind a wall":
        boundary[:, 6] = True
    elif name == "a horseshoe":
        classes[2:10, 2:12] = 1
        classes[2:8, 5:9] = 0
        boundary[1:9, 4] = boundary[1:9, 9] = boundary[8, 4:10] = True
    elif name == "a snake":
        for row in range(2, 12, 4):
            boundary[row, : 13 if row % 8 == 2 else 14] = True
            boundary[row, 0 if row % 8 != 2 else 13] = False
    elif name == "random":
        rng = np.random.default_rng(3)
        classes = np.kron(rng.integers(0, 3, (4, 7)), np.ones((3, 2), int))
        boundary = rng.random((12, 14)) < 0.3
    return classes, boundary


def maps(classes: np.ndarray, boundary: np.ndarray) -> tuple[Tensor, Tensor]:
    probability = F.one_hot(torch.from_numpy(classes), int(classes.max()) + 2).double()
    return torch.from_numpy(boundary).double()[None], probability.permute(2, 0, 1)[None]


def scipy_regions(classes: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """8-connected pixels of one class that are no boundary; every boundary pixel by itself."""
    labels = np.zeros(classes.shape, int)
    count = 0
    for value in np.unique(classes):
        found, n = ndimage.label((classes == value) & ~boundary, structure=np.ones((3, 3)))
        labels[found > 0] = found[found > 0] + count
        count += n
    labels[boundary] = count + 1 + np.arange(boundary.sum())
    return labels


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    return len(pairs) == len(np.unique(a)) == len(np.unique(b))


@pytest.mark.parametrize(
    "name", ["blocks", "same class behind a wall", "a horseshoe", "a snake", "two objects of one class"]
)
def test_regions_are_connected_components_of_drawn_maps(name):
    classes, boundary = drawn(name)
    if name == "two objects of one class":  # the classes alone would join them along a straight line
        boundary |= ndimage.binary_dilation(classes == 1, np.ones((3, 3))) & (classes == 0)
    (regions,) = RegionConstruction(small_regions="keep")(*maps(classes, boundary))
    found = regions.region.numpy().reshape(classes.shape)
    assert same_partition(found, scipy_regions(classes, boundary))
    assert found.max() + 1 > 1 and found[0, 0] == 0


def test_without_boundaries_a_class_is_one_region_and_without_classes_a_wall_divides():
    classes, boundary = drawn("two objects of one class")
    (regions,) = RegionConstruction(use_boundary=False)(*maps(classes, boundary))
    assert same_partition(regions.region.numpy(), classes.ravel())
    classes, boundary = drawn("blocks")
    boundary[:, 6] = True
    (regions,) = RegionConstruction(use_semantic=False, small_regions="keep")(*maps(classes, boundary))
    assert same_partition(regions.region.numpy(), scipy_regions(np.zeros_like(classes), boundary).ravel())


@pytest.mark.parametrize("seed", range(4))
def test_connected_regions_of_any_graph(seed):
    rng = np.random.default_rng(seed)
    together = rng.random((60, 60)) < (0.01, 0.02, 0.03, 0.0)[seed]
    together |= together.T
    found = connected_regions(torch.from_numpy(together)).numpy()
    count, expected = connected_components(together)
    assert found.max() + 1 == count and same_partition(found, expected)
    firsts = [int(np.flatnonzero(found == q)[0]) for q in range(count)]
    assert firsts == sorted(firsts)


def test_a_long_chain_is_one_region():
    order = np.random.default_rng(0).permutation(500)
    together = torch.zeros(500, 500, dtype=torch.bool)
    together[order[:-1], order[1:]] = together[order[1:], order[:-1]] = True
    assert (connected_regions(together) == 0).all()


def test_pointer_regions_point_to_the_first():
    together = torch.zeros(6, 6, dtype=torch.bool)
    for i, j in ((0, 2), (2, 4), (1, 3), (3, 4)):
        together[i, j] = together[j, i] = True
    # 4 belongs with 2 and 3 and follows 2, so 3 stays with 1: pointers do not join what components would.
    assert pointer_regions(together).tolist() == [0, 1, 0, 1, 0, 2]
    assert len(connected_regions(together).unique()) == 2


def table_by_hand(boundary: Tensor, semantic: Tensor, kernel: Tensor) -> Tensor:
    """F^g of one image: Eq. 1 to 4, entry by entry."""
    height, width = boundary.shape
    lines = line_maximum(boundary[None])[0]  # has a test of its own
    pixels = semantic.flatten(1).t()
    n = height * width
    attention = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            divergence = jensenshannon(pixels[i].numpy(), pixels[j].numpy(), base=2) ** 2
            attention[i, j] = (1 - lines[i, j]) * (1 - divergence)
    out = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    row = min(max(j // width + down, 0), height - 1)
                    column = min(max(j % width + right, 0), width - 1)
                    out[i, j] += kernel[1 + down, 1 + right] * attention[i, row * width + column]
    return out


@pytest.mark.parametrize("kernel", ["mean", "free"])
def test_attention_decisions_scores_and_representatives_by_hand(kernel):
    torch.manual_seed(0)
    boundary = 0.6 * torch.rand(1, 3, 4, dtype=torch.float64)
    semantic = (2 * torch.randn(1, 3, 3, 4, dtype=torch.float64)).softmax(1)
    construction = RegionConstruction(
        representatives=2, threshold=0.5, kernel=kernel, small_regions="keep"
    ).double()
    with torch.no_grad():
        construction.kernel_weights.add_(0.05 * torch.randn(3, 3))
    own = construction.kernel_weights.detach()
    weights = own if kernel == "free" else own.exp() / own.exp().sum()
    table = table_by_hand(boundary[0], semantic[0], weights)
    torch.testing.assert_close(construction.attention(boundary, semantic)[0], table)

    with torch.no_grad():
        (regions,) = construction(boundary, semantic)
    _, expected = connected_components(((table + table.t()) / 2 > construction.threshold).numpy())
    assert 1 < len(set(expected)) < 12 and same_partition(regions.region.numpy(), expected)
    chosen = set()
    for q in set(expected):
        inside = [i for i in range(12) if expected[i] == q]
        scores = {i: min(max(sum(float(table[i, j]) for j in inside) / len(inside), 0), 1) for i in inside}
        for i, score in scores.items():
            assert float(regions.score[i]) == pytest.approx(score)
        chosen |= set(sorted(inside, key=lambda i: -scores[i])[:2])
    assert set(regions.representatives.tolist()) == chosen
    assert regions.size == (3, 4)


@pytest.mark.parametrize(("variant", "options"), [("paper", {"map_gradients": True}), ("code", {})])
def test_scores_carry_gradients_to_both_maps_and_the_kernel(variant, options):
    torch.manual_seed(0)
    construction = RegionConstruction(variant=variant, representatives=2, **options).double()
    boundary = (0.2 + 0.3 * torch.rand(1, 2, 3, dtype=torch.float64)).requires_grad_()
    semantic = torch.randn(1, 3, 2, 3, dtype=torch.float64).softmax(1).requires_grad_()
    own = dict(construction.named_parameters())
    assert len(own) == (variant == "paper")

    def scores(boundary: Tensor, semantic: Tensor, *weights: Tensor) -> Tensor:
        # The regions stay as they are under steps of gradcheck.
        parameters = dict(zip(own, weights, strict=True))
        (regions,) = torch.func.functional_call(construction, parameters, (boundary, semantic))
        return regions.score

    assert torch.autograd.gradcheck(scores, (boundary, semantic, *own.values()))


def test_the_maps_are_left_to_their_own_supervision_but_the_kernel_learns():
    torch.manual_seed(0)
    construction = RegionConstruction(representatives=2)
    boundary = (0.2 + 0.3 * torch.rand(1, 4, 5)).requires_grad_()
    semantic = torch.randn(1, 3, 4, 5).softmax(1).requires_grad_()
    (regions,) = construction(boundary, semantic)
    regions.score.square().sum().backward()
    assert boundary.grad is None and semantic.grad is None
    assert construction.kernel_weights.grad.abs().sum() > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_however_the_kernel_learns_the_scale_of_attention_stays(sign):
    """What pulls all scores up or down makes regions of a free kernel vanish or run together, those of a mean not."""
    classes, boundary = drawn("blocks")
    boundary[:, 6] = True
    inputs = [x.float() for x in maps(classes, 0.95 * boundary)]
    found = {}
    for kernel in ("mean", "free"):
        construction = RegionConstruction(kernel=kernel, use_semantic=False)
        optimizer = torch.optim.Adam(construction.parameters(), lr=0.02)
        for step in range(21):
            (regions,) = construction(*inputs)
            if step == 0:
                first = regions.region
            optimizer.zero_grad()
            (sign * regions.score.sum()).backward()
            optimizer.step()
        assert len(first.unique()) == 2, kernel
        found[kernel] = len(regions.region.unique())
        if kernel == "mean":
            wall = torch.from_numpy(boundary).flatten()  # may go to either side
            assert torch.equal(regions.region[~wall], first[~wall])
            table = construction.attention(*inputs)
            assert table.min() >= 0 and table.max() <= 1 + 1e-6
    assert found["free"] == (classes.size if sign > 0 else 1)


def test_code_variant_by_hand():
    torch.manual_seed(0)
    boundary = 0.2 * torch.rand(1, 3, 4, dtype=torch.float64)
    semantic = (3 * torch.randn(1, 3, 3, 4, dtype=torch.float64)).softmax(1)
    construction = RegionConstruction(variant="code", representatives=3)
    assert not list(construction.parameters()) and construction.threshold == 0.8
    lines = line_maximum(boundary, ends=False)[0]
    table = (1 - lines) * (1 - binary_jensen_shannon(semantic.flatten(2).transpose(1, 2))[0])
    (regions,) = construction(boundary, semantic)
    pointer = []
    for i in range(12):
        firsts = [j for j in range(i) if (table[i, j] + table[j, i]) / 2 > 0.8]
        pointer.append(firsts[0] if firsts else i)
    for _ in range(10):
        pointer = [pointer[p] for p in pointer]
    assert 1 < len(set(pointer)) < 12 and same_partition(regions.region.numpy(), np.array(pointer))
    for i in range(12):
        inside = [j for j in range(12) if pointer[j] == pointer[i]]
        assert float(regions.score[i]) == pytest.approx(float(table[i, inside].mean()))


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize(
    ("boundary", "classes", "count"),
    [
        (0.0, "one", 1),  # a single region
        (1.0, "one", 20),  # every pixel a boundary
        (0.0, "each", 20),  # every pixel a class of its own
    ],
)
def test_extremes(variant, boundary, classes, count):
    boundary_map = torch.full((1, 4, 5), boundary, requires_grad=True)
    index = torch.zeros(4, 5, dtype=torch.long) if classes == "one" else torch.arange(20).reshape(4, 5)
    semantic = F.one_hot(index, 20).float().permute(2, 0, 1)[None].requires_grad_()
    construction = RegionConstruction(variant=variant, representatives=8, map_gradients=True)
    (regions,) = construction(boundary_map, semantic)
    if variant == "code" and classes == "one":
        count = 1  # its lines exclude their ends, so neighbours always belong together
    if variant == "code" and classes == "each":
        count = 20  # that divergence ends below log 2, and 1 - log 2 is still below the threshold
    assert int(regions.region.max()) + 1 == count
    assert len(regions.representatives) == (20 if count == 20 else 8)
    assert regions.score.isfinite().all() and 0 <= regions.score.min() and regions.score.max() <= 1
    regions.score.sum().backward()
    assert boundary_map.grad.isfinite().all() and semantic.grad.isfinite().all()


def joined_by_hand(region: np.ndarray, table: np.ndarray, count: int) -> list[int]:
    sizes = np.bincount(region)
    out = []
    for i, own in enumerate(region):
        larger = [j for j in range(len(region)) if sizes[region[j]] >= count]
        if sizes[own] < count and larger:
            own = region[max(larger, key=lambda j: (table[i, j], -j))]
        out.append(int(own))
    return out


def test_cells_of_small_regions_join_the_region_they_belong_with_most():
    rng = np.random.default_rng(0)
    regions = np.stack(
        [np.unique(rng.integers(0, 9, 30) ** 2 // 8, return_inverse=True)[1] for _ in range(3)]
    )
    tables = rng.random((3, 30, 30)).round(1)  # with ties
    tables = np.maximum(tables, tables.transpose(0, 2, 1))
    for count in (1, 3, 6, 31):
        found = join_small_regions(torch.from_numpy(regions), torch.from_numpy(tables), count)
        for got, region, table in zip(found.numpy(), regions, tables, strict=True):
            assert same_partition(got, np.array(joined_by_hand(region, table, count)))
            assert got.max() + 1 == len(np.unique(got))
            if count == 31:  # none is large enough: all stay
                assert same_partition(got, region)
            else:
                assert np.bincount(got).min() >= count


def test_boundary_cells_join_the_side_of_their_class():
    classes, boundary = drawn("blocks")
    classes[:] = 0
    classes[:, 7:] = 1
    boundary[:, 6] = boundary[:, 7] = True
    (regions,) = RegionConstruction()(*maps(classes, 0.6 * boundary))
    assert same_partition(regions.region.numpy(), classes.ravel())
    # They represent nothing: what lies between them and the others keeps their score low.
    chosen = regions.representatives.numpy()
    assert len(chosen) == 16 and not boundary.ravel()[chosen].any()


def test_regions_of_a_batch_are_those_of_its_images():
    torch.manual_seed(0)
    boundary = (0.5 * torch.rand(3, 6, 7)).pow(2)
    semantic = F.interpolate(3 * torch.randn(3, 4, 2, 2), (6, 7)).softmax(1)
    for variant in ("paper", "code"):
        construction = RegionConstruction(variant=variant, representatives=2)
        together = construction(boundary, semantic)
        assert len({len(regions.region.unique()) for regions in together}) > 1
        for image, regions in enumerate(together):
            (alone,) = construction(boundary[image : image + 1], semantic[image : image + 1])
            assert torch.equal(regions.region, alone.region)
            assert torch.equal(regions.representatives, alone.representatives)
            torch.testing.assert_close(regions.score, alone.score)


def test_more_representatives_than_pixels():
    region = torch.tensor([[0, 1, 0, 0, 2, 1], [0, 0, 0, 0, 0, 0]])
    score = torch.tensor([[0.1, 0.5, 0.9, 0.9, 0.3, 0.6], [0.2, 0.1, 0.4, 0.3, 0.6, 0.5]])
    for count, first, second in (
        (8, [2, 3, 0, 5, 1, 4], [4, 5, 2, 3, 0, 1]),
        (1, [2, 5, 4], [4]),
        (2, [2, 3, 5, 1, 4], [4, 5]),
    ):
        assert [found.tolist() for found in representatives(region, score, count)] == [first, second]


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_batch_of_no_image(variant):
    construction = RegionConstruction(variant=variant)
    boundary, semantic = torch.rand(0, 4, 5, requires_grad=True), torch.rand(0, 3, 4, 5, requires_grad=True)
    assert construction(boundary, semantic) == []
    table = construction.attention(boundary, semantic)
    assert table.shape == (0, 20, 20)
    table.sum().backward()
    assert boundary.grad.shape == boundary.shape and semantic.grad.shape == semantic.shape


@pytest.mark.parametrize("chunk", [1 << 18, 25])
def test_smoothing_is_a_convolution(chunk, monkeypatch):
    monkeypatch.setattr("ccnet_d2.layers.region_smoothing._CHUNK", chunk)
    torch.manual_seed(0)
    maps_ = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    padded = F.pad(maps_[:, None], (1, 1, 1, 1), mode="replicate")
    torch.testing.assert_close(smooth_maps(maps_, kernel), F.conv2d(padded, kernel[None, None])[:, 0])
    assert torch.autograd.gradcheck(smooth_maps, (maps_, kernel))
    assert torch.autograd.gradcheck(smooth_maps, (maps_[:, :1, :1], kernel))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "papers"}, "variant='papers' is not one of 'paper', 'code'"),
        ({"kernel": "maen"}, "kernel='maen' is not one of 'mean', 'free', 'none'"),
        ({"small_regions": "drop"}, "small_regions='drop' is not one of 'join', 'keep'"),
        ({"representatives": 0}, "representatives must be at least 1"),
        ({"use_boundary": False, "use_semantic": False}, "use_boundary or use_semantic"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        RegionConstruction(**options)
