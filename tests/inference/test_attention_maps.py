import importlib
import itertools
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ccnet_d2.errors import UserError
from ccnet_d2.inference import AttentionMaps, Predictor, draw_attention, draw_clip_attention, pixel_attention
from ccnet_d2.inference.attention import attention_weights, find_rcca, record_input
from ccnet_d2.inference.attention_pictures import heat_over_image
from ccnet_d2.inference.attention_view import AttentionView, find_image_rcca
from ccnet_d2.inference.drawing import panel_grid
from ccnet_d2.inference.visualize import heat_colors
from ccnet_d2.layers import RCCA, ClipRCCA
from ccnet_d2.ops import criss_cross_attention


def make_rcca(spatial_dims, recurrence, channels=16):
    torch.manual_seed(3)
    rcca = RCCA(channels, recurrence=recurrence, spatial_dims=spatial_dims).double().eval()
    with torch.no_grad():
        rcca.gamma.fill_(0.8)
        rcca.qkv.weight.mul_(2)  # attention far from uniform
    return rcca


def dense_matrix(query, key):
    """(N, N) criss-cross weights of one sample, pair by pair."""
    sizes = query.shape[1:]
    positions = list(itertools.product(*map(range, sizes)))
    matrix = torch.zeros(len(positions), len(positions), dtype=query.dtype)
    for i, p in enumerate(positions):
        for j, q in enumerate(positions):
            if sum(a != b for a, b in zip(p, q, strict=True)) <= 1:
                matrix[i, j] = torch.exp((query[(slice(None), *p)] * key[(slice(None), *q)]).sum())
    return matrix / matrix.sum(dim=1, keepdim=True), positions


def dense_loops(rcca, features):
    """The loops' dense matrices A_1, A_2, … for one sample, running the layer's arithmetic densely as
    well."""
    x = features[0]
    matrices = []
    for _ in range(rcca.recurrence):
        query, key, value = (part[0] for part in rcca.project(x[None]))
        matrix, positions = dense_matrix(query, key)
        matrices.append(matrix)
        x = rcca.gamma * (value.flatten(1) @ matrix.T).view_as(x) + x
    return matrices, positions


@pytest.mark.parametrize(
    ("sizes", "recurrence"), [((5, 7), 1), ((5, 7), 2), ((4, 6), 3), ((3, 4, 5), 3), ((1, 6), 2), ((7,), 2)]
)
@torch.no_grad()
def test_maps_are_rows_of_the_product_of_dense_matrices(sizes, recurrence):
    rcca = make_rcca(len(sizes), recurrence)
    features = torch.randn(1, 16, *sizes, dtype=torch.float64)
    matrices, positions = dense_loops(rcca, features)
    for position in (positions[0], positions[len(positions) // 2 + 1]):
        maps = pixel_attention(rcca, features, position)
        assert len(maps) == recurrence
        row = torch.zeros(len(positions), dtype=torch.float64)
        row[positions.index(position)] = 1
        product = torch.eye(len(positions), dtype=torch.float64)
        for loop in range(recurrence):
            product = matrices[loop] @ product  # A_r … A_1
            torch.testing.assert_close(maps[loop][0].flatten(), row @ product)
            assert maps[loop].sum().item() == pytest.approx(1, abs=1e-12)


@torch.no_grad()
def test_one_loop_is_zero_off_the_cross_and_two_loops_nowhere():
    rcca = make_rcca(2, 2)
    first, second = pixel_attention(rcca, torch.randn(2, 16, 6, 8, dtype=torch.float64), (2, 5))
    cross = torch.zeros(6, 8, dtype=torch.bool)
    cross[2] = cross[:, 5] = True
    assert first[:, ~cross].eq(0).all()
    assert first[:, cross].gt(0).all()
    assert second.gt(0).all()
    in_3d = pixel_attention(make_rcca(3, 3), torch.randn(1, 16, 3, 4, 5, dtype=torch.float64), (1, 2, 3))
    assert [int((one > 0).sum()) for one in in_3d] == [
        3 + 4 + 5 - 2,
        3 * 4 + 3 * 5 + 4 * 5 - 3 - 4 - 5 + 1,
        60,
    ]


def test_maps_equal_the_gradient_of_the_linearised_layer():
    """With each loop's weights held fixed the aggregation is linear: its gradient is the influence."""
    rcca = make_rcca(2, 3)
    features = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    projections, x = [], features
    with torch.no_grad():
        for _ in range(3):
            query, key, _ = rcca.project(x)
            projections.append((query, key))
            x = rcca.attend(x)
    for loops, expected in enumerate(pixel_attention(rcca, features, (3, 1)), start=1):
        values = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
        out = values
        for query, key in projections[:loops]:
            out = criss_cross_attention(query, key, out, backend="reference")
        out[0, 0, 3, 1].backward()
        torch.testing.assert_close(values.grad[0, 0], expected[0])


def test_maps_are_the_attention_part_of_the_influence_through_the_residuals():
    """With the weights held fixed and values as they are, R loops are prod(gamma A_r + I), a polynomial in gamma whose
    highest coefficient, A_R ... A_1, is the map: taken here from gradients through the layer's own arithmetic."""
    rcca = make_rcca(2, 2)
    with torch.no_grad():
        rcca.qkv.weight[4:, :, 0, 0] = torch.eye(16, dtype=torch.float64)
        rcca.qkv.bias[4:] = 0
    features = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    loops, x = [], features
    with torch.no_grad():
        for _ in range(2):
            loops.append(rcca.project(x)[:2])
            x = rcca.attend(x)

    def influence(gamma):
        x = features.clone().requires_grad_()
        out = x
        for query, key in loops:
            value = rcca.project(out)[2]
            out = gamma * criss_cross_attention(query, key, value, backend="matmul") + out
        (grad,) = torch.autograd.grad(out[0, 7, 3, 1], x)
        assert grad[0, [c for c in range(16) if c != 7]].eq(0).all()
        return grad[0, 7]

    after_one, after_two = pixel_attention(rcca, features, (3, 1))
    second_difference = (influence(2.0) - 2 * influence(1.0) + influence(0.0)) / 2
    torch.testing.assert_close(second_difference, after_two[0])
    del loops[1]
    torch.testing.assert_close(influence(1.0) - influence(0.0), after_one[0])


@torch.no_grad()
def test_the_samples_of_a_batch_do_not_mix():
    rcca = make_rcca(2, 2)
    features = torch.randn(3, 16, 4, 5, dtype=torch.float64)
    together = pixel_attention(rcca, features, (1, 1))[1]
    alone = pixel_attention(rcca, features[2:], (1, 1))[1]
    torch.testing.assert_close(together[2:], alone)


def test_recurrence_may_be_chosen_and_half_features_are_taken():
    rcca = make_rcca(2, 2).float()
    features = torch.randn(1, 16, 4, 5).half()
    assert len(attention_weights(rcca, features, recurrence=4)) == 4
    maps = pixel_attention(rcca, features, (0, 0), recurrence=1)
    assert len(maps) == 1 and maps[0].dtype == torch.float32
    with pytest.raises(ValueError, match="recurrence must be at least 1"):
        attention_weights(rcca, features, recurrence=0)
    for outside in ((4, 0), (0, -1), (0,)):
        with pytest.raises(ValueError, match="lies outside features of sizes"):
            pixel_attention(rcca, features, outside)


def test_finding_the_layer_and_recording_its_input():
    one = nn.Sequential(nn.Conv2d(3, 8, 1), RCCA(8))
    assert find_rcca(one) is one[1]
    two = nn.ModuleDict({"a": RCCA(8), "b": RCCA(8)})
    assert find_rcca(two, "b") is two["b"]
    with pytest.raises(ValueError, match="several RCCA layers, name one: a, b"):
        find_rcca(two)
    with pytest.raises(ValueError, match="no RCCA layer 'c': a, b"):
        find_rcca(two, "c")
    with pytest.raises(ValueError, match="has no criss-cross attention"):
        find_rcca(nn.Conv2d(3, 3, 1))
    image = torch.randn(1, 3, 4, 4)
    with record_input(one[1]) as seen:
        one(image)
    one(image)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], one[0](image))


def test_what_another_thread_runs_meanwhile_is_not_recorded():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), RCCA(8))
    own, other = torch.randn(2, 1, 3, 4, 4)
    with record_input(model[1]) as seen:
        thread = threading.Thread(target=model, args=(other,))
        thread.start()
        thread.join()
        model(own)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model[0](own))


class PaddingModel(nn.Module):
    """Stride 8, padded to a multiple of 32, with a context module on the features."""

    input_format = "RGB"

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 8, stride=8)
        self.context = RCCA(16, recurrence=2)
        self.classify = nn.Conv2d(16, 3, 1)

    def forward(self, inputs):
        image = inputs[0]["image"].float() / 255
        height, width = image.shape[-2:]
        padded = nn.functional.pad(image, (0, -width % 32, 0, -height % 32))
        logits = self.classify(self.context(self.backbone(padded[None])))
        logits = nn.functional.interpolate(logits, scale_factor=8, mode="bilinear")[..., :height, :width]
        size = (inputs[0]["height"], inputs[0]["width"])
        return [{"sem_seg": nn.functional.interpolate(logits, size, mode="bilinear")[0]}]


def test_pixels_of_a_resized_and_padded_image_find_their_cell():
    from detectron2.data import transforms as T

    torch.manual_seed(0)
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    predictor = Predictor(PaddingModel(), augmentations=[T.Resize((40, 72))])
    # 40x72 in the network, padded to 64x96: 8x12 cells, of which 5x9 show the image.
    for (x, y), cell in {
        (0, 0): (0, 0),
        (99, 59): (4, 8),
        (50, 30): (2, 4),
        (10, 12): (1, 0),
        (11, 11): (0, 1),
    }.items():
        found = predictor.attention(image, x, y)
        assert found.cell == cell
        assert found.extent == (5.0, 9.0)
        assert [one.shape for one in found.maps] == [(8, 12), (8, 12)]
        assert all(one.sum() == pytest.approx(1, abs=1e-5) for one in found.maps)
    assert len(predictor.attention(image, 0, 0, recurrence=3).maps) == 3
    for x, y in ((100, 0), (0, 60), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=rf"pixel \({x}, {y}\) lies outside the image of 100x60"):
            predictor.attention(image, x, y)


def test_one_view_answers_for_any_number_of_loops():
    torch.manual_seed(0)
    image = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    predictor = Predictor(PaddingModel())
    view = predictor.look_into(image)
    for loops in (1, 3, 2):
        found, fresh = view.at(9, 30, recurrence=loops), predictor.attention(image, 9, 30, recurrence=loops)
        assert len(found.maps) == loops
        assert all(np.array_equal(one, other) for one, other in zip(found.maps, fresh.maps, strict=True))
    for recurrence in (0, -1):
        with pytest.raises(ValueError, match="recurrence must be at least 1"):
            view.at(9, 30, recurrence=recurrence)


def panel_pixels(picture, color):
    return int((picture == np.array(color, np.uint8)).all(axis=2).sum())


def test_the_figure_shows_a_panel_for_each_loop_and_marks_the_pixel():
    image = np.full((48, 48, 3), 90, np.uint8)
    cross = np.zeros((12, 12), np.float32)
    cross[3, :] = cross[:, 4] = 1 / 23
    even = np.full((12, 12), 1 / 144, np.float32)
    pixel = (18, 14)
    one = draw_attention(AttentionMaps(image, pixel, (3, 4), [cross], (12.0, 12.0)))
    two = draw_attention(AttentionMaps(image, pixel, (3, 4), [cross, even], (12.0, 12.0)))
    assert two.shape[1] - one.shape[1] >= 240  # 48 pixels are enlarged five times
    green = (40, 255, 60)
    assert 0 < panel_pixels(one, green) < panel_pixels(two, green)
    # Off the cross the picture is the darkened image, on it bright: rows of the first map's panel.
    dark, bright = panel_pixels(one, (46, 46, 47)), panel_pixels(one, (236, 239, 155))
    assert dark > 100 * 100 and bright > 200 * 15

    titled = draw_attention(AttentionMaps(image, pixel, (3, 4), [cross], (12.0, 12.0)), titles=["a", "b"])
    assert titled.shape == one.shape
    with pytest.raises(ValueError, match="1 titles for 2 panels"):
        draw_attention(AttentionMaps(image, pixel, (3, 4), [cross], (12.0, 12.0)), titles=["a"])


@pytest.mark.parametrize(("height", "width"), [(7, 11), (1, 4), (20, 3)])
def test_a_pixel_s_cell_is_the_one_that_its_middle_lies_in(height, width):
    """A feature map of 3x5 cells, of which the image covers 2.6 rows and all columns."""
    view = AttentionView(
        np.zeros((height, width, 3), np.uint8),
        torch.zeros(2, height, width),
        RCCA(8).eval(),
        torch.randn(1, 8, 3, 5),
        (2.6, 5.0),
    )
    for y in range(height):
        for x in range(width):
            # In halves of a pixel and fifths of a cell, to stay exact.
            row = next(r for r in range(3) if (2 * y + 1) * 13 < 10 * height * (r + 1))
            column = next(c for c in range(5) if (2 * x + 1) * 5 < 2 * width * (c + 1))
            assert view.at(x, y, recurrence=1).cell == (row, column)


def test_where_a_pixel_looks_that_is_not_finite_is_told():
    """Of a model whose training diverged; drawing it was an IndexError."""
    features = torch.randn(1, 8, 3, 5)
    features[0, 2, 1, 1] = torch.nan
    view = AttentionView(
        np.zeros((3, 5, 3), np.uint8), torch.zeros(2, 3, 5), RCCA(8).eval(), features, (3.0, 5.0)
    )
    with pytest.raises(
        UserError, match=r"^where pixel \(4, 1\) looks is not finite \(NaN or infinite\): .*\.$"
    ):
        view.at(4, 1)


def test_attention_over_more_than_an_image_is_refused():
    for layer in (RCCA(8, spatial_dims=3), ClipRCCA(8)):
        with pytest.raises(UserError, match="attention is over clips, not single images"):
            find_image_rcca(nn.Sequential(layer))
    assert isinstance(find_image_rcca(nn.Sequential(RCCA(8))), RCCA)


@pytest.fixture
def drawn(monkeypatch):
    """Rows of panels, and the titles above them, of each figure that is drawn."""
    drawn = []
    module = importlib.import_module("ccnet_d2.inference.attention_pictures")
    grid = module.panel_grid

    def noting(rows, heads, **options):
        drawn.append((rows, heads))
        return grid(rows, heads, **options)

    monkeypatch.setattr(module, "panel_grid", noting)
    return drawn


def test_each_panel_shows_its_own_map_over_its_own_image(drawn):
    """Where the image covers five of six rows of the feature map; clips as bright as all their frames side by side."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 192, 240, 3), np.uint8)  # as large as they are shown
    maps = [(share * rng.random((3, 6, 8)) ** 4).astype(np.float32) for share in (0.6, 0.3)]
    extent = (5.0, 8.0)
    draw_attention(
        AttentionMaps(frames[0], (3, 4), (0, 0), [m[0] for m in maps], extent), titles=["a", "b", "c"]
    )
    figure = draw_clip_attention(frames, maps, (1, 3, 4), extent=extent)
    grid = panel_grid(drawn[1][0], drawn[1][1], row_titles=["t = 0", "t = 1", "t = 2"])
    assert np.array_equal(figure[: len(grid)], grid) and len(figure) > len(grid)  # and the scale
    draw_clip_attention(frames, maps, (1, 3, 4))
    ((row,), heads), (rows, clip_heads), (whole_rows, _) = drawn
    assert heads == ["a", "b", "c"]
    assert clip_heads[1:] == [
        f"R = {loop} (max {100 * m.max():.0f} %)" for loop, m in enumerate(maps, start=1)
    ]
    expected = [frames[0], *(heat_over_image(frames[0], m[0], extent) for m in maps)]
    found = list(row)
    for panels, rows_covered in ((rows, 5.0), (whole_rows, 6.0)):
        for time in range(3):
            expected.append(frames[time])
            for shares in maps:
                side_by_side = heat_over_image(
                    np.concatenate(frames, axis=1), np.concatenate(shares, axis=1), (rows_covered, 24.0)
                )
                expected.append(side_by_side[:, 240 * time :][:, :240])
            found += panels[time]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one != other).any(axis=2).mean() < 0.02  # but for the marks


def test_heat_shows_the_cell_below_each_pixel_s_middle():
    """Two pixels of different heat differ in colour, those of one cell do not; the square root tells small shares."""
    image = np.full((7, 11, 3), 90, np.uint8)
    shares = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    heat = heat_over_image(image, shares, (1.6, 3.0))
    colors = heat_over_image(np.full((2, 3, 3), 90, np.uint8), shares, (2.0, 3.0))
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 6
    for y in range(7):
        for x in range(11):
            row, column = int((y + 0.5) * 1.6 / 7), int((x + 0.5) * 3 / 11)
            assert (heat[y, x] == colors[row, column]).all(), (y, x)
    image[:] = 200, 30, 90
    quarter = heat_over_image(image[:1, :2], np.array([[0.25, 1.0]], np.float32), (1.0, 2.0))[0, 0]
    gray, color = (
        0.299 * 200 + 0.587 * 30 + 0.114 * 90,
        heat_colors(np.array([0.5]))[0].astype(float),
    )  # the root of a quarter
    weight = 0.15 + 1.2 * 0.5
    np.testing.assert_allclose(quarter, (1 - weight) * 0.6 * gray + weight * color, atol=1)
    nothing = heat_over_image(image, np.zeros((2, 3), np.float32), (2.0, 3.0))
    assert (nothing == nothing[0, 0]).all() and nothing.max() < 90


def test_marks_sit_on_the_pixel_and_titles_tell_the_largest_share(drawn):
    image, (x, y), factor = np.full((48, 60, 3), 90, np.uint8), (41, 17), 4  # shown at 192 x 240
    maps = [np.full((6, 8), share, np.float32) for share in (0.125, 0.0125, 0.00125)]
    draw_attention(AttentionMaps(image, (x, y), (2, 5), maps, (6.0, 8.0)))
    draw_clip_attention(np.stack([image] * 2), [np.stack([one] * 2) for one in maps], (1, x, y))
    shares = ["R = 1 (max 12 %)", "R = 2 (max 1.2 %)", "R = 3 (max 0.12 %)"]
    assert [heads for _, heads in drawn] == [[f"pixel ({x}, {y})", *shares], ["frame", *shares]]
    ((row,), _), ((other, marked), _) = drawn
    assert len(row) == len(marked) == 4 and not any(panel_pixels(panel, (40, 255, 60)) for panel in other)
    for panel in (*row, *marked):
        rows, columns = np.nonzero((panel == (40, 255, 60)).all(axis=2))
        for found, at in ((rows, y), (columns, x)):
            # The arms reach as far to one side as to the other.
            assert (found.min() + found.max()) / 2 == pytest.approx((at + 0.5) * factor, abs=1)
            assert found.max() - found.min() >= 16
    # The pixel itself is free to be seen.
    for panel in (row[0], marked[0]):
        assert (panel[y * factor :][:factor, x * factor :][:, :factor] == 90).all()


def test_brightness_is_relative_to_the_largest_share_even_in_the_padding():
    image = np.full((8, 8, 3), 90, np.uint8)
    shares = np.array([[0.2, 0.8]], np.float32)
    whole = heat_over_image(np.concatenate([image, image], axis=1), shares, (1.0, 2.0))
    left_half = heat_over_image(image, shares, (1.0, 1.0))  # the right cell is padding
    assert np.array_equal(left_half, whole[:, :8])


def test_a_model_without_semantic_segmentation_is_told():
    class Detector(PaddingModel):
        def forward(self, inputs):
            return [{"instances": None} for _ in super().forward(inputs)]

    with pytest.raises(UserError, match="Detector gives no semantic segmentation"):
        Predictor(Detector()).attention(np.zeros((32, 32, 3), np.uint8), 0, 0)


def test_the_figure_of_a_clip_has_a_row_for_each_frame():
    frames = np.full((3, 48, 60, 3), 90, np.uint8)
    maps = [np.full((3, 6, 8), 1 / 144, np.float32)] * 2
    three = draw_clip_attention(frames, maps, (1, 30, 20))
    two = draw_clip_attention(frames[:2], [m[:2] for m in maps], (1, 30, 20))
    assert three.shape[1] == two.shape[1]
    assert three.shape[0] - two.shape[0] >= 192  # four times 48 pixels and a title
    assert panel_pixels(three, (40, 255, 60)) == panel_pixels(two, (40, 255, 60)) > 0
    with pytest.raises(ValueError, match="an attention map of 2 frames for 3 images"):
        draw_clip_attention(frames, [maps[0][:2]], (0, 0, 0))
