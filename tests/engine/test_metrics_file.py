"""metrics.json after a crash."""

import pytest

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


@pytest.mark.parametrize(
    ("start", "at", "kept"),
    [
        (5, 5, True),  # with more iterations
        (4, 5, False),  # from a checkpoint before
        (0, 0, False),  # anew
    ],
)
def test_the_evaluation_at_the_end_stays_where_a_run_goes_on_from_there(tmp_path, start, at, kept):
    path = tmp_path / "metrics.json"
    evaluation = f'{{"iteration": {at}, "sem_seg/mIoU": 60.0}}\n'
    path.write_text('{"iteration": 3, "total_loss": 2}\n' + evaluation)
    drop_metrics_from(path, start)
    assert (evaluation in path.read_text()) is kept


def test_evaluations_that_come_again_go(tmp_path):
    path = tmp_path / "metrics.json"
    before = '{"iteration": 3, "total_loss": 2}\n'
    for again in (
        '{"iteration": 5, "sem_seg/mIoU": 60.0}\n{"iteration": 6, "total_loss": 1}\n',
        '{"iteration": 5, "total_loss": 1, "sem_seg/mIoU": 60.0}\n',
    ):
        path.write_text(before + again)
        drop_metrics_from(path, 5)
        assert path.read_text() == before
