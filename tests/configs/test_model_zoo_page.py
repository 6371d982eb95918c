"""MODEL_ZOO.md: every run is there with its own numbers and its published weights, and links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from ccnet_d2.engine import apply_overrides
from ccnet_d2.model_zoo import PUBLISHED, config_names, get_config

PAGE = Path(__file__).parents[2] / "projects/CCNet/MODEL_ZOO.md"
TEXT = PAGE.read_text(encoding="utf-8")

# What the sources print, a second time: (single scale, multi-scale + flip).
REPORTED = {
    "cityscapes/ccnet_r1_R_101_D8_769x769_60k.py": ("78.0",),
    "cityscapes/ccnet_R_101_D8_769x769_60k.py": ("79.8",),
    "cityscapes/ccnet_r3_R_101_D8_769x769_60k.py": ("80.2",),
    "cityscapes/ccnet_ccl_R_101_D8_769x769_60k.py": ("80.5",),
    "cityscapes/ccnet_R_50_D8_769x769_60k.py": ("78.5",),
    "cityscapes/ccnet_ccl_R_50_D8_769x769_60k.py": ("79.3",),
    "cityscapes/ccnet_official_r1_R_101_D8_769x769_60k.py": ("77.91",),
    "cityscapes/ccnet_official_R_101_D8_769x769_60k.py": ("79.74",),
    "cityscapes/ccnet_ohem_R_101_D8_769x769_60k.py": ("80.00",),
    "cityscapes/ccnet_R_50_D8_512x1024_40k.py": ("77.76", "78.87"),
    "cityscapes/ccnet_R_101_D8_512x1024_40k.py": ("76.35", "78.19"),
    "cityscapes/ccnet_R_50_D8_769x769_40k.py": ("78.46", "79.93"),
    "cityscapes/ccnet_R_101_D8_769x769_40k.py": ("76.94", "78.62"),
    "cityscapes/ccnet_R_50_D8_512x1024_80k.py": ("79.03", "80.16"),
    "cityscapes/ccnet_R_101_D8_512x1024_80k.py": ("78.87", "79.90"),
    "cityscapes/ccnet_R_50_D8_769x769_80k.py": ("79.29", "81.08"),
    "cityscapes/ccnet_R_101_D8_769x769_80k.py": ("79.45", "80.66"),
    "ade20k/ccnet_R_50_D8_512x512_80k.py": ("41.78", "42.98"),
    "ade20k/ccnet_R_101_D8_512x512_80k.py": ("43.97", "45.13"),
    "ade20k/ccnet_R_50_D8_512x512_160k.py": ("42.08", "43.13"),
    "ade20k/ccnet_R_101_D8_512x512_160k.py": ("43.71", "45.04"),
    "ade20k/ccnet_ccl_R_101_D8_512x512_100k.py": ("45.76",),
    "voc12/ccnet_R_50_D8_512x512_20k.py": ("76.17", "77.51"),
    "voc12/ccnet_R_101_D8_512x512_20k.py": ("77.27", "79.02"),
    "voc12/ccnet_R_50_D8_512x512_40k.py": ("75.96", "77.04"),
    "voc12/ccnet_R_101_D8_512x512_40k.py": ("77.87", "78.90"),
    "camvid/ccnet3d_T5_R_101_D8_504x504.py": ("79.1",),
    "camvid/ccnet3d_T1_R_101_D8_504x504.py": ("77.9",),
}
# What was trained here, as the tables of README.md have it: s/iter, memory, mIoU. All other runs are blank.
MEASURED = {"camvid/ccnet_R_18_D8_half.py": ["0.029", "0.47 GiB", "58.0"]}
# Those of RANet have tests of their own: test_ranet_runs.py.
RUNS = [
    name
    for name in config_names()
    if name.split("/")[0] in ("cityscapes", "ade20k", "voc12", "camvid") and "/ranet_" not in name
]


def rows() -> dict[str, list[str]]:
    """The cells behind the link of every run."""
    found = {}
    for line in TEXT.splitlines():
        link = re.match(r"\| \[([^]]+)\]\(\.\./\.\./configs/([^)]+)\) \|", line)
        if link:
            assert link[2] == f"{link[1]}.py" and link[2] not in found
            found[link[2]] = [cell.strip() for cell in line.split("|")[2:-1]]
    return found


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (PAGE.parent / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (PAGE.parent / path).read_text(), flags=re.MULTILINE)
                assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_every_run_for_a_public_data_set_is_linked():
    drawn = ("toy/", "quick_schedules/")
    linked = re.findall(r"\]\(\.\./\.\./configs/([^)]+\.py)\)", TEXT)
    assert sorted(linked) == sorted(name for name in config_names() if not name.startswith(drawn))


@pytest.mark.parametrize(
    ("network", "kind", "depth", "reported"),
    [
        ("R-50-FPN", "", 50, "38.2"),
        ("R-50-FPN + NL", "nl_", 50, "39.0"),
        ("R-50-FPN + RCCA", "rcca_", 50, "39.3"),
        ("R-101-FPN", "", 101, "40.1"),
        ("R-101-FPN + NL", "nl_", 101, "40.8"),
        ("R-101-FPN + RCCA", "rcca_", 101, "41.0"),
    ],
)
def test_detectors_are_there_with_the_paper_s_numbers(network, kind, depth, reported):
    names = [f"coco/mask_rcnn_{kind}R_{depth}_FPN_{times}x" for times in (1, 3)]
    links = " | ".join(f"[{name}](../../configs/{name}.py)" for name in names)
    assert f"\n| {network} | {links} | 16 | {reported} |\n" in TEXT
    assert [get_config(f"{name}.py").train.max_iter for name in names] == [90000, 270000]
    assert {get_config(f"{name}.py").dataloader.train.total_batch_size for name in names} == {16}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_there_with_its_numbers(name):
    backbone, crop, iterations, batch, *figures, weights = rows()[name]
    cfg = get_config(name)
    assert backbone.split(",")[0] == f"R-{cfg.model.backbone.depth}"
    assert ("CCL" in backbone) == ("category_consistent" in cfg.model.sem_seg_head)
    assert ("OHEM" in backbone) == (cfg.model.sem_seg_head.loss == "ohem")
    recurrence = re.search(r"R=(\d)", backbone)
    context = cfg.model.sem_seg_head.context
    assert recurrence is None or context == "rcca" + {"2": ""}.get(recurrence[1], f"_r{recurrence[1]}")
    height, width = cfg.dataloader.train.mapper.augmentations[0].crop_size
    assert crop == f"{height}x{width}"
    assert iterations == f"{cfg.train.max_iter // 1000}k"
    assert int(batch) == cfg.dataloader.train.total_batch_size

    expected = REPORTED.get(name, ("–",))
    ours = 4 if len(expected) == 2 else 3
    assert tuple(figures[ours:]) == expected
    assert figures[:ours] == MEASURED.get(name, [""] * ours)

    entry = PUBLISHED.get(name.removesuffix(".py"))
    if entry is None:
        assert weights == ""
    else:
        link = re.fullmatch(r"\[(\w+)\]\((.+)\)", weights)
        assert link and link[2] == entry.address
        assert link[1] == (entry.sha256 or entry.file.removesuffix(".pth").removeprefix("ccnet_"))


def test_the_paper_s_single_frames_have_three_loops():
    """Tab. 9, T=1: "We use the R = 3" (Sec. 4.7), so no figure of it stands beside the run with two."""
    with torch.device("meta"):
        loops = {
            name: instantiate(
                get_config(f"camvid/{name}_R_101_D8_504x504.py").model
            ).sem_seg_head.context.recurrence
            for name in ("ccnet", "ccnet3d_T1", "ccnet3d_T5")
        }
    assert loops == {"ccnet": 2, "ccnet3d_T1": 3, "ccnet3d_T5": 3}


def test_overrides_on_the_page_are_those_of_a_run():
    cfg = get_config("cityscapes/ccnet_R_50_D8_512x1024_40k.py")
    overrides = re.findall(r"`((?:model|test)\.[a-z_.]+=[^` ]+)", TEXT)
    contexts = re.findall(r"^\| `([a-z_0-9]+)` \|", TEXT, flags=re.MULTILINE)
    assert len(overrides) >= 5 and len(contexts) == 8
    for override in [*overrides, *(f"model.sem_seg_head.context={name}" for name in contexts)]:
        with torch.device("meta"):
            instantiate(apply_overrides(cfg.copy(), [override]).model)
