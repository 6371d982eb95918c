"""The benchmark of the op: what it measures against computes the right thing, and a small run yields every figure."""

import json
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ccnet_d2.layers import RCCA
from ccnet_d2.ops import available_backends, criss_cross_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "projects" / "CCNet" / "tools"))
import benchmark_op
import check_cuda_op
import op_report
from attention_formulations import (
    RecurrentModule,
    TextbookModule,
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


def test_table_of_one_case():
    case = Case(parse_arguments(["--channels", "16"], ""), (6, 5), torch.float32)
    row = {"section": "core", "size": "6x5", "dtype": "float32", "pass": "forward"}
    rows = [
        row | {"candidate": "textbook", "ms": 12.3456, "speedup": 1.0, "to_floor": 24.0},
        row | {"candidate": "non-local", "ms": 1.5, "speedup": 8.2304, "to_floor": None},
        row | {"candidate": "of another dtype", "dtype": "bfloat16", "ms": 1.0},
        row | {"candidate": "of another size", "size": "5x6", "ms": 1.0},
    ]
    assert render_rows(rows, case).splitlines() == [
        "",
        "core: 6x5, float32",
        "                       ms  x textbook  x floor",
        "forward  textbook   12.35        1.00    24.00",
        "forward  non-local   1.50        8.23        –",
    ]
    assert render_rows(rows[3:], case) == ""


def test_bars_are_as_long_as_the_speed_up():
    axis = Figure().subplots()
    row = {"dtype": "float32", "size": "6x5"}
    rows = [
        row | {"pass": what, "candidate": name, "speedup": speedup}
        for what, speedups in (("forward", (1.0, 3.0, 0.5)), ("backward", (1.0, 7.0, 2.0)))
        for name, speedup in zip(("textbook", "compiled", "matmul"), speedups, strict=True)
    ]
    op_report._draw_speedups(axis, rows)
    found = {
        bars.get_label(): [(bar.get_width(), round(bar.get_y(), 6)) for bar in bars]
        for bars in axis.containers
    }
    assert found == {"compiled": [(3.0, 0.0), (7.0, 1.0)], "matmul": [(0.5, 0.4), (2.0, 1.4)]}
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["6x5 float32\nforward", "6x5 float32\nbackward"]


def test_growth_is_drawn_in_milliseconds():
    axis = Figure().subplots()
    series = {"dtype": "float32", "pass": "forward", "exponent": 1.5, "points": [(100, 0.003), (400, 0.024)]}
    op_report._draw_growth(axis, [series])
    [line] = axis.lines
    assert line.get_xydata().tolist() == [[100, 3], [400, 24]]


def test_weights_of_all_pairs_are_tried_where_the_memory_holds_them():
    arguments = parse_arguments(["--channels", "16", "--device", "cpu"])
    for size, fits in ((8, True), (4000, False)):  # 20 x 4000^4 bytes
        cores = Case(arguments, (size, size), torch.float32).cores()
        assert ("non-local" in cores) == fits and "non-local SDPA" in cores


def small_case():
    return Case(parse_arguments(["--channels", "16", "--device", "cpu"]), (6, 5), torch.float32)


@pytest.mark.parametrize("backward", [False, True])
def test_calls_are_the_passes_that_they_are_called(backward):
    """In the layout that each is made for."""
    case = small_case()
    case.arguments.backends = ["matmul", "compiled"]
    last, seen = {}, []

    def recording(query, key, value):
        seen.append([x.movedim(1, -1).is_contiguous() for x in (query, key, value)])
        return query.sum() + key.sum() + value

    case.cores = lambda: dict.fromkeys(["textbook", "matmul", "compiled", "non-local"], recording)
    for name, call in case.core_calls(backward=backward).items():
        result = call()
        last[name] = all(seen[-1]) if all(seen[-1]) == any(seen[-1]) else None
        if backward:
            assert [len(x[0]) for x in result] == [2, 2, 16]
        else:
            assert not result.requires_grad
    assert last == {
        "textbook": False,
        "matmul": True,
        "compiled": True,
        "compiled, NCHW": False,
        "non-local": False,
    }


def test_layers_are_comparable():
    case = small_case()
    modules = case.modules()
    assert next(iter(modules)) == "textbook" and set(modules) >= {"textbook", "matmul", "reference"}
    for name, module in modules.items():
        assert module.gamma.item() == 1 and sum(p.numel() for p in module.parameters()) == 16 * 20 + 20 + 1
        assert getattr(module, "recompute", False) == (name == "compiled, recompute")
    for name, call in case.module_calls(modules, backward=True).items():
        shapes = [gradient.shape for gradient in call()]
        assert shapes == [(1, 16, 6, 5), *(p.shape for p in modules[name].parameters())]
    assert not case.module_calls(modules, backward=False)["textbook"]().requires_grad


def test_textbook_layer_is_the_layer():
    ours = RCCA(16, 2, backend="reference")
    theirs = TextbookModule(16, 8, 2)
    torch.nn.init.constant_(ours.gamma, 0.7)
    torch.nn.init.constant_(theirs.gamma, 0.7)
    convolutions = (theirs.query, theirs.key, theirs.value)
    parts = zip(convolutions, ours.qkv.weight.split([2, 2, 16]), ours.qkv.bias.split([2, 2, 16]), strict=True)
    for convolution, weight, bias in parts:
        convolution.weight.data, convolution.bias.data = weight.data.clone(), bias.data.clone()
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(RecurrentModule(theirs, 2)(x), ours(x), rtol=1e-4, atol=1e-5)


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
        ("--channels 10 --reduction 4", "--channels 10 is not divisible by --reduction 4"),
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


@pytest.mark.parametrize("parse", [parse_arguments, check_cuda_op.parse_arguments])
def test_files_that_cannot_be_written_are_refused_at_once(parse, tmp_path, monkeypatch, capsys):
    """They would be lost after minutes."""
    (tmp_path / "file").touch()

    def refused(name):
        with pytest.raises(SystemExit):
            parse(["--json", str(tmp_path / name)])
        return capsys.readouterr().err

    assert f"{tmp_path / 'file'} cannot be made (" in refused("file/a.json")
    assert f"'{tmp_path}' is a folder: name a file." in refused("")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    assert f"{tmp_path / 'new'} is read-only for this user" in refused("new/a.json")
