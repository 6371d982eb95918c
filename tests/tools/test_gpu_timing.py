"""The median of what calls take on a GPU, with times that are given."""

import pytest

import gpu_timing
from tests.clock import Clock


@pytest.mark.parametrize(
    ("times", "repeats", "median"),
    [
        ([0.9, 0.9, 0.9, 0.1, 0.5, 0.2], 3, 0.2),  # the first three do not count
        ([7, 5, 6], 50, 6),  # slow ones do, and three are enough where they use up the time
    ],
)
def test_median(times: list[float], repeats: int, median: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, passed = Clock(), []

    def take(call: object) -> float:
        passed.append(times[len(passed)])
        clock.wait(passed[-1])
        return passed[-1]

    monkeypatch.setattr(gpu_timing, "device_seconds", take)
    monkeypatch.setattr(gpu_timing, "time", clock)
    assert gpu_timing.median_seconds(lambda: None, repeats, most_seconds=10) == median
    assert passed == times
