"""Pictures of RANet's regions: the regions are the model's own, dots sit on representatives, and demo.py draws them."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from ccnet_d2.errors import UserError
from ccnet_d2.inference import Predictor, RegionMap, draw_regions, find_regions
from ccnet_d2.inference.visualize import heat_colors
from ccnet_d2.modeling import CCNet, CCNetHead, PlainConvNet, RANetHead
from tests.scripts import load_script

GREEN = (40, 255, 60)


def predictor(size_divisibility: int = 0, **options) -> Predictor:
    torch.manual_seed(0)
    backbone = PlainConvNet(channels=(8, 8), strides=(1, 2))
    head = RANetHead(
        backbone.output_shape(),
        **{"in_feature": "conv", "num_classes": 3, "channels": 8, "norm": "BN", "representatives": 3}
        | {"small_regions": "keep", "threshold": 0.8}  # noise makes few others
        | options,
    )
    if options.get("context") is None:
        with torch.no_grad():  # sharp scores make several regions
            head.semantic.weight.mul_(40)
            head.boundary.weight.normal_(std=6)
    model = CCNet(
        backbone=backbone,
        sem_seg_head=head,
        pixel_mean=[127.0] * 3,
        pixel_std=[60.0] * 3,
        size_divisibility=size_divisibility,
    )
    return Predictor(model.eval(), classes=["a", "b", "c"], augmentations=[])


def picture(height: int = 20, width: int = 28) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((4, 4, 1), np.uint8))


def test_regions_are_those_the_model_makes():
    of = predictor()
    image = picture()
    found = find_regions(of, image)
    head = of.model.sem_seg_head
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - 127) / 60
    with torch.no_grad():
        a = head.reduce(of.model.backbone(x)["conv"])
        (expected,) = head.context.construction(head.boundary(a)[:, 0].sigmoid(), head.semantic(a).softmax(1))
    assert found.region.shape == (10, 14) and found.extent == (10, 14)
    np.testing.assert_array_equal(found.region.ravel(), expected.region)
    np.testing.assert_allclose(found.score.ravel(), expected.score, rtol=1e-5)
    assert [r * 14 + c for r, c in found.representatives] == expected.representatives.tolist()
    assert found.region.max() > 0 and found.count == 3


def test_a_padded_image_covers_a_part_of_the_grid():
    found = find_regions(predictor(size_divisibility=32), picture())
    assert found.region.shape == (16, 16) and found.extent == (10, 14)
    found = find_regions(predictor(pair_cells=64), picture(24, 24))
    assert found.region.shape == (8, 8) and found.extent == (8, 8)


def drawn_map() -> RegionMap:
    region = np.zeros((4, 6), int)
    region[:, 3:] = 1
    region[0, 5] = 2
    region[3, 3:5] = 3
    score = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    return RegionMap(
        np.full((80, 120, 3), 128, np.uint8),
        region,
        score,
        [(0, 0), (2, 1), (1, 4), (0, 5), (3, 3)],
        2,
        (4, 6),
    )


def test_dots_sit_on_representatives_of_regions_with_more_cells_than_k():
    canvas = draw_regions(drawn_map())
    green = (canvas == GREEN).all(2)
    # Centres of mass of the dots in the left of three panels, in cells.
    width = (canvas.shape[1] - 4 * 8) / 3
    cell = width / 6
    left = green[:, : int(width) + 8]
    tops = [row for row in range(left.shape[0]) if left[row].any()]
    assert tops
    top_of_panel = (canvas.shape[0]) - np.flatnonzero((canvas[::-1, 20] == 128).all(1)).max() - 1
    found = set()
    for row, column in np.argwhere(left):
        found.add((int((row - top_of_panel) // cell), int((column - 8) // cell)))
    # Region 2 has one cell and region 3 two, no more than K, so that they have no dots.
    assert found == {(0, 0), (2, 1), (1, 4)}
    assert green[:, int(width) + 8 :].any()  # and the same beside it


def test_panels_show_regions_and_scores_cell_by_cell(monkeypatch):
    found, panels = drawn_map(), []
    module = importlib.import_module("ccnet_d2.inference.regions")
    grid = module.panel_grid
    monkeypatch.setattr(module, "panel_grid", lambda rows, heads: panels.extend(rows[0]) or grid(rows, heads))
    draw_regions(found)
    plain, tinted, heat = panels
    side = plain.shape[0] // 4
    # Off the outlines and dots: the lower left of each cell, between its centre and its corner.
    at = np.ix_(np.arange(4) * side + side * 7 // 8, np.arange(6) * side + side // 8)
    assert (plain[at] == 128).all()
    colors = tinted[at].reshape(-1, 3)
    alone = found.region.ravel() == 2
    assert (colors[alone] == round(0.35 * 128 + 0.65 * 150)).all()
    assert (np.ptp(colors[~alone].astype(int), axis=1) > 20).all()
    assert len({tuple(color) for color in colors}) == len(np.unique(found.region))
    scores = (255 * found.score).round() / 255
    np.testing.assert_array_equal(heat[at], heat_colors(scores))


def test_text_says_how_many_regions(monkeypatch):
    titles, texts = [], []
    module = importlib.import_module("ccnet_d2.inference.regions")
    grid, line = module.panel_grid, module.text_line
    monkeypatch.setattr(module, "panel_grid", lambda rows, heads: titles.extend(heads) or grid(rows, heads))
    monkeypatch.setattr(module, "text_line", lambda text, *rest: texts.append(text) or line(text, *rest))
    draw_regions(drawn_map())
    assert titles[1] == "4 regions"
    assert texts[0].startswith("4x6 cells; 1 region of one cell, grey; green: the 2 representatives")


def test_models_without_regions_are_told():
    backbone = PlainConvNet(channels=(8, 8), strides=(1, 2))
    head = CCNetHead(
        backbone.output_shape(), in_feature="conv", num_classes=3, channels=8, norm="BN", aux_feature=None
    )
    model = CCNet(backbone=backbone, sem_seg_head=head, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    with pytest.raises(UserError, match="CCNet has 0 region construction blocks"):
        find_regions(Predictor(model.eval(), augmentations=[]), picture())
    with pytest.raises(UserError, match="0 region construction blocks"):
        find_regions(predictor(context="none"), picture())
    with pytest.raises(UserError, match="take output=fine"):
        find_regions(predictor(output="coarse"), picture())


@pytest.fixture
def demo():
    return load_script("demo.py")


def test_from_the_command_line(tmp_path, demo, capsys):
    from detectron2.config import instantiate

    from ccnet_d2.model_zoo import get_config

    torch.manual_seed(0)
    torch.save(
        {"model": instantiate(get_config("toy/ranet_synthetic.py").model).state_dict()}, tmp_path / "w.pth"
    )
    Image.fromarray(picture(24, 32)).save(tmp_path / "noise.png")
    base = ["--config-file", "toy/ranet_synthetic.py", "--checkpoint", str(tmp_path / "w.pth")]
    base += ["--input", str(tmp_path / "noise.png"), "--output", str(tmp_path / "out.png"), "--regions"]
    assert demo.main([*base, "--opts", "train.device=cpu"]) == 0
    assert "1 written to" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as found:
        assert found.width > 3 * 240
    with pytest.raises(SystemExit):
        demo.parse([*base, "--mode", "slide"])
    assert "--regions looks at the image as a whole" in capsys.readouterr().err
