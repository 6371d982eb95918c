"""3D attention on clips: the figures, by hand."""

import re

import pytest

from ccnet_d2.analysis.clip_table import MAPS, clip_table, format_clip_table
from ccnet_d2.ops import available_backends
from tests.scripts import load_script

C, KEYS = 512, 64


def flops(n: int, keys: int) -> float:
    """10^9 FLOPs of a loop: projections, energies, aggregation."""
    return 2 * (n * C * (C + 2 * KEYS) + n * keys * (KEYS + C)) / 1e9


def test_the_maps_of_the_paper():
    table = clip_table(measure_time=False)
    rows = {(tuple(row["map"]), row["method"]): row for row in table["rows"]}
    assert [shape[2:] for shape in MAPS] == [(5, 63, 63), (8, 97, 97)]
    fastest = "compiled" if available_backends()["compiled"] is None else "matmul"
    assert [row["backend"] for row in table["rows"]] == [fastest, "sdpa", "matmul"] * 2
    for shape in MAPS:
        frames, height, width = shape[2:]
        n = frames * height * width
        rcca, fused, full = (
            rows[shape, method] for method in ("RCCA (R=3)", "full, fused", "full, map in memory")
        )
        assert rcca["keys"] == frames + height + width - 2 and fused["keys"] == full["keys"] == n
        # The op computes each line whole and leaves out the two repetitions of the position itself.
        assert rcca["gflops"] == pytest.approx(3 * flops(n, frames + height + width), rel=1e-3)
        assert full["gflops"] == pytest.approx(flops(n, n), rel=1e-3)
        # The map, with its softmax one table of N x N that stays for the backward pass.
        assert full["memory_mb"] == pytest.approx(4e-6 * n * n, rel=0.1)
        assert fused["memory_mb"] < 0.1 * full["memory_mb"] and rcca["memory_mb"] < 0.25 * full["memory_mb"]
        assert {row["seconds"] for row in (rcca, fused, full)} == {None}
    text = format_clip_table(table)
    for row in table["rows"]:
        assert 0 < row["memory_mb"] < row["peak_mb"]
        assert re.search(
            rf" {row['gflops']:.1f} +{row['memory_mb']:.0f} +{row['peak_mb']:.0f} +{row['backend']}\n", text
        )
    assert "8x97x97           RCCA (R=3)    200" in text and all(key in text for key in table["conventions"])


def test_time_is_measured_where_it_runs():
    rows = clip_table([(1, 16, 2, 5, 6)])["rows"]
    assert [row["seconds"] is not None and row["seconds"] > 0 for row in rows] == [True, True, False]


def test_the_tool_prints_it(capsys):
    script = load_script("tools/analyze_model.py")
    assert script.main(["--table", "clips", "--no-time"]) == 0
    assert "8x97x97  full, map in memory  75272" in capsys.readouterr().out
