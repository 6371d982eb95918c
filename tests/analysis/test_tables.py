"""The papers' cost tables: the printed figures are met where the issue is one of arithmetic, and said where not."""

import pytest

from ccnet_d2.analysis.ccnet_table import ccnet_table, format_ccnet_table
from ccnet_d2.analysis.ranet_table import format_ranet_table, ranet_table
from ccnet_d2.ops import available_backends

# CCNet, TPAMI, Tab. 2 and 5; a second time, by hand: 2 x (projections + energies + aggregation).
SIDE, C, KEYS = 97, 512, 64
N = SIDE**2
RCCA_LOOP = 2 * (N * C * (C + 2 * KEYS) + N * 2 * SIDE * (KEYS + C)) / 1e9
NL_LOOP = 2 * (N * C * (C + 2 * KEYS) + N * N * (KEYS + C)) / 1e9


def test_ccnet_table():
    table = ccnet_table()
    rows = {row["method"]: row for row in table["rows"]}
    for method, gflops, memory, by_hand in (
        ("RCCA (R=1)", 8.3, 53, RCCA_LOOP),
        ("RCCA (R=2)", 16.5, 127, 2 * RCCA_LOOP),
        ("RCCA (R=3)", 24.7, 208, 3 * RCCA_LOOP),
        ("NL", 108, 1411, NL_LOOP),
        ("NL (R=2)", 216, 2820, 2 * NL_LOOP),
    ):
        row = rows[method]
        assert (row["paper_gflops"], row["paper_memory_mb"]) == (gflops, memory)
        assert row["gflops"] == pytest.approx(gflops, rel=0.015)
        assert row["gflops"] == pytest.approx(by_hand, rel=1e-3)
        assert row["difference_percent"] == pytest.approx(100 * (row["gflops"] / gflops - 1))
        assert 0 < row["memory_mb"] < row["peak_mb"]
        if row["backend"] == "compiled" or method.startswith("NL"):
            assert row["memory_mb"] <= memory
        else:  # without the compiled op the energies are kept as well
            assert row["memory_mb"] <= 1.1 * memory
    fastest = "compiled" if available_backends()["compiled"] is None else "matmul"
    assert {rows[f"RCCA (R={r})"]["backend"] for r in (1, 2, 3)} == {fastest}
    # At its peak non-local attention holds the map and its gradient.
    assert rows["NL"]["peak_mb"] > 2 * 4e-6 * N * N
    # Fused attention does without the map; every loop but the first also keeps its input.
    assert rows["NL, fused"]["memory_mb"] < rows["NL"]["memory_mb"] - 0.9 * 4e-6 * N * N
    loops = [rows[f"RCCA (R={r})"]["memory_mb"] for r in (1, 2, 3)]
    assert loops[2] - loops[1] == pytest.approx(loops[1] - loops[0], rel=1e-3)
    assert loops[1] - 2 * loops[0] == pytest.approx(4e-6 * N * C, rel=1e-3)

    text = format_ccnet_table(table)
    assert "RCCA (R=2)         16.5   16.54  +0.2%          127" in text
    assert all(key in text for key in table["conventions"])


def test_ccnet_table_as_text():
    row = {"method": "RCCA", "paper_gflops": 8.0, "gflops": 8.4567, "difference_percent": 5.70875}
    row |= {"paper_memory_mb": 53, "memory_mb": 41.24, "peak_mb": 97.04, "backend": "matmul"}
    unprinted = dict.fromkeys(("paper_gflops", "difference_percent", "paper_memory_mb"))
    table = {"source": "a paper", "input": [1, 2, 3, 4], "conventions": {}}
    text = format_ccnet_table(table | {"rows": [row, row | unprinted | {"method": "NL"}]}).splitlines()
    assert text[0] == "a paper, on a map of 1x2x3x4"
    cells = [line.split() for line in text if line.startswith(("method", "RCCA", "NL"))]
    assert cells == [
        ["method", "paper", "here", "diff", "paper", "here", "peak", "backend"],
        ["RCCA", "8", "8.46", "+5.7%", "53", "41.2", "97.0", "matmul"],
        ["NL", "-", "8.46", "-", "41.2", "97.0", "matmul"],
    ]


def test_ranet_table():
    table = ranet_table(["Asymmetric NL", "CCNet", "DANet", "PSANet"])
    rows = {row["method"]: row for row in table["rows"]}
    assert {m: tuple(row["paper"].values()) for m, row in rows.items()} == {
        "Asymmetric NL": (163, 13, 634),
        "CCNet": (198, 18, 730),
        "DANet": (264, 23, 2611),
        "PSANet": (372, 50, 3124),
    }
    # By hand: multiply-adds of 3x3 convolutions at 97x97.
    conva, convb, fuse = (N * 9 * c_in * 512 / 1e9 for c_in in (2048, 512, 2560))
    ccnet = rows["CCNet"]["costs"]
    assert ccnet["module alone"]["gmacs"] == pytest.approx(RCCA_LOOP, rel=1e-3)
    assert ccnet["with reduction"]["gmacs"] == pytest.approx(conva + RCCA_LOOP, rel=1e-3)
    head = conva + RCCA_LOOP + convb + fuse + N * 512 * 19 / 1e9
    assert ccnet["whole head"]["gmacs"] == pytest.approx(head, rel=1e-3)
    assert ccnet["whole head"]["gflops"] == pytest.approx(2 * head, rel=1e-3)
    # DANet from 2048 channels: four 3x3 convolutions, query, key, value, two gammas; the classifier.
    norms = 4 * 2 * 512
    weights = 2 * 9 * 512 * (2048 + 512) + norms + 512 * 640 + 640 + 2 + 512 * 19 + 19
    assert rows["DANet"]["costs"]["whole head"]["parameters_m"] == pytest.approx(weights / 1e6)
    assert set(rows["PSANet"]["costs"]) == {"module alone", "whole head"}

    for row in rows.values():
        for figure, nearest in row["nearest"].items():
            printed = row["paper"][figure]
            assert nearest["met"] == (abs(nearest["value"] / printed - 1) <= 0.05)
            meaning, scope = nearest["what"].rstrip("'").split(" of '")
            assert row["costs"][scope][meaning] == nearest["value"]
            if figure == "gflops":
                distances = [abs(c[k] - printed) for c in row["costs"].values() for k in ("gmacs", "gflops")]
                assert abs(nearest["value"] - printed) == pytest.approx(min(distances))
    assert rows["CCNet"]["nearest"]["gflops"]["met"] and rows["DANet"]["nearest"]["parameters_m"]["met"]
    text = format_ranet_table(table)
    assert "PSANet: parameters_m 50 matches nothing measured" in text
    assert "CCNet: gflops 198 matches gflops of 'with reduction' 194.1 (-2.0%)." in text


def check_ranet_rows(shape: tuple[int, int, int, int]) -> dict:
    """RANet's own rows, their FLOPs and parameters by hand: 25 regions of 8 representatives each."""
    table = ranet_table(["RANet", "RANet (released)"], shape)
    rows = {row["method"]: row for row in table["rows"]}
    channels, pixels, chosen = shape[1], shape[2] * shape[3], 25 * 8
    assert all(tuple(row["paper"].values()) == (212, 21, 1893) for row in rows.values())

    maps = pixels * channels * (19 + 1)  # B and C
    exchange = 4 * chosen * pixels * channels + 2 * chosen**2 * channels  # energies and sums of Eq. 6 to 8
    reduction = pixels * 9 * 2048 * channels
    last = pixels * (9 * 2 * channels * channels + 19 * channels)
    paper = {scope: cost["gmacs"] for scope, cost in rows["RANet"]["costs"].items()}
    for scope, count in (
        ("module alone", 0),
        ("with reduction", reduction),
        ("whole head", reduction + last),
    ):
        assert paper[scope] == pytest.approx((maps + exchange + count) / 1e9, rel=1e-3), scope
    # Queries, values and the distribution are 3x3 convolutions of the map, the others of the representatives.
    convolutions = 9 * channels * channels * (3 * pixels + 2 * chosen)
    released = rows["RANet (released)"]["costs"]["module alone"]["gmacs"]
    assert released == pytest.approx((maps + exchange + convolutions) / 1e9, rel=1e-3)
    parameters = rows["RANet"]["costs"]["module alone"]["parameters_m"] * 1e6
    assert parameters == pytest.approx(20 * (channels + 1) + 9)
    released = rows["RANet (released)"]["costs"]["module alone"]["parameters_m"] * 1e6
    assert released == pytest.approx(20 * (channels + 1) + 5 * (9 * channels**2 + 2 * channels))
    for row in rows.values():
        assert all(0 < cost["memory_mb"] < cost["peak_mb"] for cost in row["costs"].values())
    text = format_ranet_table(table)
    assert "RANet, paper " in text and "25 of equal size" in text
    return rows


def test_ranet_s_own_rows_on_a_small_map():
    check_ranet_rows((1, 16, 18, 18))


@pytest.mark.slow
def test_ranet_s_own_rows_at_the_paper_s_size():
    rows = check_ranet_rows((1, 512, 97, 97))
    # Five tables of all 97^2 x 97^2 pairs would be 1771 MB, of the 1893 that the paper prints.
    assert rows["RANet"]["costs"]["module alone"]["memory_mb"] < 300
    assert rows["RANet (released)"]["nearest"]["parameters_m"]["met"]
    assert rows["RANet (released)"]["nearest"]["gflops"]["met"]
