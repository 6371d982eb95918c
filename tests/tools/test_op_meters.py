"""The clock, the memory meter and the floors of benchmark_op.py, where they are known."""

from collections.abc import Callable

import pytest
import torch

import op_meters
from op_meters import Machine, MemoryMeter, Timer
from tests.clock import Clock

CPU = torch.device("cpu")


class CallClock(Clock):
    """Passes by calls that take as long as they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def call(self, name: str, times: list[float]) -> Callable[[], None]:
        left = iter(times)

        def take() -> None:
            self.calls.append(name)
            self.wait(next(left))

        return take


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> CallClock:
    clock = CallClock()
    monkeypatch.setattr(op_meters, "time", clock)
    return clock


def test_candidates_take_turns(clock: CallClock) -> None:
    """Neither the call that warms up nor the first of each turn counts."""
    calls = {
        "a": clock.call("a", [9, *(9, 1, 2), *(9, 3, 5), *(9, 4, 8)]),
        "b": clock.call("b", [7, *(7, 6, 6), *(7, 5, 5), *(7, 4, 4)]),
    }
    assert Timer(CPU).compare(calls, 40) == {"a": 3.5, "b": 5}
    assert "".join(clock.calls) == "ab" + 3 * "aaabbb"


def test_a_call_that_takes_all_the_time_is_made_twice(clock: CallClock) -> None:
    """One after the other, so that nobody's memory is taken in between; a slow first call alone says nothing."""
    calls = {
        "fast": clock.call("f", [1, *3 * (1, 0.5, 0.5)]),
        "slow": clock.call("s", [100, 50]),
        "late": clock.call("l", [9, 1, *3 * (1, 0.25, 0.25)]),
    }
    assert Timer(CPU).compare(calls, 4) == {"slow": 50, "fast": 0.5, "late": 0.25}
    assert "".join(clock.calls) == "fssll" + 3 * "ffflll"


def test_rates_are_the_best_that_were_seen(clock: CallClock, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(Timer(CPU), seconds=10)
    assert machine._best(clock.call("", [1, 5, 2, 4])) == 2
    for product, convolution, copy in ((4, 2, 0.5), (8, 9, 1)):
        best = iter((product, convolution, copy))
        monkeypatch.setattr(machine, "_best", lambda call, best=best: next(best))
        machine.measure(torch.float32)
    assert machine.flops_per_second(torch.float32) == 2048**3  # of a product, two operations, in two seconds
    assert machine.bytes_per_second == 2 * 2**26 / 0.5  # 64 MiB read and written


@pytest.mark.parametrize(
    ("native", "single", "measured"),
    [(50.0, 1.0, torch.float32), (2.0, 1.0, torch.float16), (0.5, 1.0, torch.float16)],
)
def test_processors_without_half_precision_multiply_in_fp32(
    native: float, single: float, measured: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(Timer(CPU), seconds=1)
    seconds = {torch.float16: native, torch.float32: single}
    monkeypatch.setattr(machine, "_small_product", seconds.__getitem__)
    assert machine._multiplied(torch.float16) == measured
    assert machine._multiplied(torch.float32) == torch.float32


@pytest.mark.parametrize(
    ("dtype", "flops", "bandwidth", "forward", "both"),
    [
        # By hand: 16 pairs of 2 + 3 multiply-adds, and 4 positions of 10 numbers; backward 16 of 12, and 4 of 20.
        (torch.float32, 160, 1e9, 1, 1 + 384 / 160),
        (torch.float32, 1e9, 16, 160 / 16, (160 + 320) / 16),
        (torch.bfloat16, 1e9, 16, 80 / 16, (80 + 160) / 16),
    ],
)
def test_floors(dtype: torch.dtype, flops: float, bandwidth: float, forward: float, both: float) -> None:
    machine = Machine(Timer(CPU), seconds=1)
    machine._flops[dtype], machine.bytes_per_second = flops, bandwidth
    assert machine.floors(1, 2, 3, (2, 2), dtype) == pytest.approx((forward, both))


def test_peak_is_above_what_was_held() -> None:
    meter = MemoryMeter(CPU)
    if not meter.available:
        pytest.skip("the peak of a call cannot be read here")
    held = torch.ones(2**24)
    once: list[torch.Tensor] = []

    def call() -> torch.Tensor:
        if not once:
            once.append(torch.ones(2**25))
        return held.exp().add(1).sum()

    # Two maps of 64 MiB at once; what the first call leaves is not the second one's.
    assert meter.peak(call) == pytest.approx(2 * 2**26 / 1e6, rel=0.05)
