"""The benchmark of the op: what it measures against computes the right thing, and a small run yields every figure."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ccnet_d2.ops import available_backends, criss_cross_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "projects" / "CCNet" / "tools"))
import benchmark_op
from attention_formulations import (
    non_local_attention,
    non_local_sdpa,
    operator_flops,
    textbook_attention,
)
from op_arguments import parse_arguments
from op_candidates import Case
from op_report import fit_exponent, render_rows


@pytest.mark.parametrize("sizes", [(6,), (5, 4), (3, 4, 5)])
def test_textbook_formulation_is_the_op(sizes):
    query, key, value = (torch.randn(2, c, *sizes, dtype=torch.float64) for c in (3, 3, 7))
    expected = criss_cross_attention(query, key, value, backend="reference")
    torch.testing.assert_close(textbook_attention(query, key, value), expected)


def test_non_local_formulations_agree_with_a_sum_over_positions():
    query, key, value = (torch.randn(1, c, 2, 3, dtype=torch.float64) for c in (2, 2, 4))
    q, k, v = (x.flatten(2)[0] for x in (query, key, value))
    expected = torch.empty(4, 6, dtype=torch.float64)
    for i in range(6):
        weights = torch.tensor([float(q[:, i] @ k[:, j]) for j in range(6)], dtype=torch.float64).softmax(0)
        expected[:, i] = (v * weights).sum(1)
    for function in (non_local_attention, non_local_sdpa):
        torch.testing.assert_close(function(query, key, value), expected.view(1, 4, 2, 3))


def test_exponent_of_a_power_law():
    assert fit_exponent([(n, 3e-6 * n**1.5) for n in (100, 900, 2500)]) == pytest.approx(1.5)


def test_operations():
    # Four positions on two lines of two each: 16 query-key pairs, counted with the masked ones.
    assert operator_flops(1, 2, 3, (2, 2)) == (2 * 16 * (2 + 3), 2 * 16 * (3 * 2 + 2 * 3))


def test_speed_of_threads_is_against_one_thread():
    case = Case(parse_arguments(["--channels", "16"], ""), (6, 5), torch.float32)
    row = {"size": case.name, "dtype": "float32", "pass": "forward", "candidate": "compiled", "speedup": 1.9}
    head = {
        section: render_rows([{"section": section, **row}], case).splitlines()[2]
        for section in ("core", "threads")
    }
    assert "x textbook" in head["core"] and "textbook" not in head["threads"]
    assert "x one thread" in head["threads"]


def test_small_run(tmp_path, capsys):
    report, picture = tmp_path / "folder" / "bench.json", tmp_path / "bench.png"
    command = ["--device", "cpu", "--sizes", "6x5", "--channels", "16", "--seconds", "0.001"]
    only = ["core", "module", "memory"]
    command += ["--dtype", "float32", "--only", *only, "--json", str(report), "--plot", str(picture)]
    assert benchmark_op.main(command) == 0
    rows = json.loads(report.read_text())["rows"]
    wanted = {"textbook"} | {name for name, reason in available_backends().items() if reason is None}
    for section in only:
        assert wanted <= {row["candidate"] for row in rows if row["section"] == section}
    assert all(row["ms"] > 0 and row["speedup"] > 0 for row in rows if row["section"] != "memory")
    assert all(
        row["to_floor"] > 0
        for row in rows
        if row["section"] == "core" and "non-local" not in row["candidate"]
    )
    assert "x textbook" in capsys.readouterr().out
    assert Image.open(picture).width > Image.open(picture).height  # two panels side by side


@pytest.mark.parametrize("text", ["", "x", "0x4", "1x2x3x4"])
def test_wrong_sizes_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--sizes", text])
    assert "is no size" in capsys.readouterr().err


def test_energies_have_the_deviation_asked_for():
    command = ["--device", "cpu", "--channels", "256", "--energy-std", "16", "--backends", "reference"]
    case = Case(parse_arguments(command), (24, 24), torch.float32)
    seen = {}
    case.cores = lambda: {"reference": lambda query, key, value: seen.update(q=query, k=key) or value}
    case.core_calls(backward=False)["reference"]()
    energies = seen["q"].flatten(2)[0].T @ seen["k"].flatten(2)[0]
    assert energies.std().item() == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("text", ["-1", "nan", "inf"])
def test_wrong_energies_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--energy-std", text])
    assert "must be a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--batch 0", "'0' is no whole number from 1 on"),
        ("--reduction 0", "'0' is no whole number from 1 on"),
        ("--threads -1", "'-1' is no whole number from 1 on"),
        ("--seconds 0", "must be a finite number above 0"),
        ("--device meta", "'meta' is no device to measure"),
        ("--device cpu:1", "'cpu:1' is not there"),
        ("--plot a.xyz", "must end in one of .png, .svg, .pdf"),
        ("--plot a.png --only memory", "--plot needs one of the sections"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(command, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(command.split())
    assert message in capsys.readouterr().err
