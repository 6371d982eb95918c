"""CE2P with PSP and with RCCA side by side, against counts by hand."""

import pytest

from ccnet_d2.analysis.ce2p_table import ce2p_table, format_ce2p_table

# By hand, at 473x473: res5 is 30x30, res2 119x119. Millions of parameters, norms (two a channel) included.
N5, N2 = 30**2, 119**2
PSP = (4 * (2048 * 512 + 1024) + 4096 * 512 * 9 + 1024) / 1e6
QKV = 512 * (512 + 64 + 64) + 512 + 64 + 64
RCCA = ((2048 + 512 + 2560) * 512 * 9 + 3 * 1024 + QKV + 1) / 1e6


def test_figures_equal_those_by_hand():
    table = ce2p_table()
    rows = {row["part"]: row["costs"] for row in table["rows"]}
    context = rows["sem_seg_head.context"]
    assert context["PSP"]["parameters_m"] == pytest.approx(PSP, rel=1e-6)
    assert context["RCCA (R=2)"]["parameters_m"] == pytest.approx(RCCA, rel=1e-6)
    # The 1x1 convolutions of PSP work on 1 + 4 + 9 + 36 cells.
    psp = 2 * (4096 * 512 * 9 * N5 + 2048 * 512 * 50) / 1e9
    loop = 2 * N5 * (512 * 640 + 2 * 30 * (64 + 512)) / 1e9
    rcca = 2 * (2048 + 512 + 2560) * 512 * 9 * N5 / 1e9 + 2 * loop
    assert context["PSP"]["gflops"] == pytest.approx(psp, rel=1e-3)
    assert context["RCCA (R=2)"]["gflops"] == pytest.approx(rcca, rel=1e-3)
    for part in ("backbone", "sem_seg_head.decoder", "sem_seg_head.edge", "sem_seg_head.fuse"):
        assert rows[part]["PSP"] == rows[part]["RCCA (R=2)"]
    fuse = rows["sem_seg_head.fuse"]["PSP"]
    assert fuse["gflops"] == pytest.approx(2 * 1024 * 256 * N2 / 1e9, rel=1e-3)
    total = rows["total"]
    for name, parameters in (("PSP", PSP), ("RCCA (R=2)", RCCA)):
        parts = [rows[p][name] for p in ("backbone", "sem_seg_head")]
        for key in ("parameters_m", "gflops"):
            assert total[name][key] == pytest.approx(sum(part[key] for part in parts), rel=1e-6)
        assert total[name]["parameters_m"] > parameters + 42
    text = format_ce2p_table(table)
    assert "sem_seg_head.context              23.07   34.08           23.92   43.77" in text
    assert f"PSP {table['inference_peak_mb']['PSP']:.0f}, RCCA (R=2)" in text
