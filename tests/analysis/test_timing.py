"""The median of calls, by a clock that stands still between them."""

import torch

from ccnet_d2.analysis import timing
from tests.clock import Clock


def test_median_after_a_call_that_is_not_counted(monkeypatch):
    left, clock = [90.0, 5.0, 1.0, 4.0, 8.0, 2.0], Clock()
    monkeypatch.setattr(timing, "time", clock)
    seconds = timing.median_seconds(lambda: clock.wait(left.pop(0)), torch.device("cpu"), repeats=5)
    assert seconds == 4
    assert left == []


def test_a_gpu_is_waited_for(monkeypatch):
    """The call itself is over at once."""
    clock, device = Clock(), torch.device("cuda", 1)
    monkeypatch.setattr(timing, "time", clock)
    waits = {device: 3.0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.wait(waits[device]))
    assert timing.median_seconds(lambda: None, device, repeats=2) == 3
