"""metrics.json after a crash."""

from ccnet_d2.engine.metrics_file import drop_metrics_from


def test_lines_to_come_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.json"
    drop_metrics_from(path, 5)
    assert not path.exists()
    path.write_text(
        '{"iteration": 3, "a": 1}\n{"iteration": 7}\n{"a": 2}\n[]\n{"iteration": 4}\n{"iteration": 9, "tot'
    )
    drop_metrics_from(path, 5)
    assert path.read_text() == '{"iteration": 3, "a": 1}\n{"iteration": 4}\n'
    before = path.stat().st_mtime_ns
    drop_metrics_from(path, 5)
    assert path.stat().st_mtime_ns == before
