"""The median of calls, by a clock that stands still between them."""

from types import SimpleNamespace

import torch

from ccnet_d2.analysis import timing


def test_median_after_a_call_that_is_not_counted(monkeypatch):
    left, passed = [90.0, 5.0, 1.0, 4.0, 8.0, 2.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: sum(passed)))

    def call():
        passed.append(left.pop(0))

    assert timing.median_seconds(call, torch.device("cpu"), repeats=5) == 4
    assert left == []
