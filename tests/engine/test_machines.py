"""Machines watching each other through one store; here each is an object of this process, and time passes as told."""

import gc
import socket
import time
from collections.abc import Callable

import pytest

from ccnet_d2.engine import machines as module
from ccnet_d2.engine.machines import MachineLostError, Machines
from ccnet_d2.errors import UserError
from tests.clock import Clock


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class MachineClock(Clock):
    """Stands still until it is told to go on, however long a busy computer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.end = time.monotonic() + 60  # where waiting is for nothing

    def sleep(self, seconds: float) -> None:
        assert time.monotonic() < self.end
        time.sleep(0.001)

    def pass_time(self, seconds: int, *living: Machines) -> None:
        """In steps of a second, in each of which the machines that live hear of each other."""
        for _ in range(seconds):
            self.wait(1)
            for machine in living:
                wait_until(
                    lambda machine=machine: (
                        machine._last_contact == self.now or not machine._watcher.is_alive()
                    )
                )


@pytest.fixture
def clock(monkeypatch):
    clock = MachineClock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(port, clock, monkeypatch):
    """Makes a machine; all that are left are closed."""
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.01)
    made = []

    def make(rank, machines=2, per_machine=1):
        made.append(Machines("127.0.0.1", port, machines, rank, per_machine))
        return made[-1]

    yield make
    for machine in reversed(made):
        fall_silent(machine)


def fall_silent(machine: Machines) -> None:
    """It beats no more."""
    machine.__exit__(None, None, None)
    machine._watcher.join()


def lost(machine: Machines) -> str:
    """What `check` raises now."""
    try:
        machine.check()
    except MachineLostError as error:
        return str(error)
    return ""


def soon_lost(machine: Machines) -> str:
    wait_until(lambda: lost(machine) != "")
    return lost(machine)


def test_a_failure_is_told_to_all_others_and_the_first_counts(start, clock):
    machines = [start(rank, machines=3) for rank in range(3)]
    machines[1].report_failure("Process 1 of 3 was killed.")
    machines[2].report_failure("Connection closed by peer.")
    message = "Machine 1 failed: Process 1 of 3 was killed."
    assert soon_lost(machines[0]) == soon_lost(machines[2]) == message
    clock.pass_time(3, machines[1])
    assert lost(machines[1]) == ""
    clock.wait(100)  # which the others do not spend listening
    assert lost(machines[0]) == message


def test_what_broke_a_connection_is_waited_for(start, monkeypatch):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 60)
    first, second = start(0), start(1)
    first.report_failure("Out of memory.")
    assert second.failure_elsewhere() == "Machine 0 failed: Out of memory."
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0)
    assert first.failure_elsewhere() is None


def test_leaving_by_an_error_is_a_failure_and_by_an_exit_status_is_not(start, clock):
    first, second = start(0), start(1)
    second.finish()
    second.__exit__(SystemExit, SystemExit(143), None)
    first.finish()  # waits for the second, which has left
    clock.pass_time(3, first)
    assert lost(first) == ""


def test_leaving_by_an_error(start):
    first, second = start(0), start(1)
    second.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert soon_lost(first) == "Machine 1 failed: Machine 1 stopped."


def test_machine_0_leaves_by_an_error_when_the_others_know(start):
    """With it goes the store, where they look for the reason."""
    first, second = start(0), start(1)
    first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert lost(second) == "Machine 0 failed: Machine 0 stopped."


def test_machine_0_does_not_wait_for_long(start, clock):
    first, second = start(0), start(1)
    fall_silent(second)
    clock.sleep = clock.wait
    begun = clock.now
    first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert 1 < clock.now - begun < 10


def test_silence(start, clock):
    first, second = start(0), start(1)
    clock.pass_time(60, first, second)
    assert lost(first) == lost(second) == ""
    fall_silent(second)
    clock.pass_time(18, first)
    assert lost(first) == ""
    clock.pass_time(4, first)
    assert lost(first) == "Machine 1 has been silent for 21 s."


def test_machine_0_waits_for_those_that_work(start, clock):
    """And is told where one of them is lost meanwhile."""
    first, second = start(0), start(1)
    clock.sleep = lambda seconds: clock.pass_time(1, first)
    fall_silent(second)
    with pytest.raises(MachineLostError, match="Machine 1 has been silent"):
        first.finish()


def test_a_machine_that_is_done_may_be_silent(start, clock):
    first, second = start(0), start(1)
    clock.pass_time(1, first, second)
    second.finish()
    fall_silent(second)
    clock.pass_time(60, first)
    assert lost(first) == ""


def test_a_machine_may_come_late(start, clock):
    first = start(0)
    clock.pass_time(60, first)
    second = start(1)
    clock.pass_time(3, first, second)
    assert lost(first) == lost(second) == ""


def test_a_machine_that_hears_nothing_of_machine_0(start, clock):
    """Its own thread waits for an answer that a broken network does not bring."""
    start(0)
    second = start(1)
    fall_silent(second)
    clock.wait(19)
    assert lost(second) == ""
    clock.wait(2)
    assert lost(second) == "Machine 0 (127.0.0.1) has been silent for 21 s."
    second._store = None  # which nobody may ask any more: there would be no answer
    second.report_failure("Process 1 of 2 was killed.")


@pytest.mark.parametrize("call", ["check", "report_failure", "finish"])
def test_machine_0_is_gone(start, call):
    """Killed, with its store."""
    message = "Machine 0 (127.0.0.1) cannot be reached any more."
    first, second = start(0), start(1)
    if call == "report_failure":
        fall_silent(second)  # before it hears of it by itself
    fall_silent(first)
    first._store = None
    gc.collect()
    if call == "check":
        assert soon_lost(second) == message
    elif call == "report_failure":
        second.report_failure("Process 1 of 2 was killed.")
        assert lost(second) == message
    else:
        second._watcher.join()
        with pytest.raises(MachineLostError) as error:
            second.finish()
        assert str(error.value) == message


def test_two_of_one_rank(start):
    start(0), start(1)
    with pytest.raises(UserError, match="--machine-rank 1"):
        start(1)


def test_a_stray_machine_with_other_numbers_does_not_end_a_run(start, clock):
    first, second = start(0), start(1)
    with pytest.raises(UserError, match="2 machines with 1 processes each"):
        start(1, per_machine=4)
    clock.pass_time(3, first, second)
    assert lost(first) == lost(second) == ""


def test_a_machine_that_is_waited_for_with_other_numbers_does(start):
    first = start(0)
    with pytest.raises(UserError, match="2 machines with 1 processes each"):
        start(1, per_machine=4)
    assert "this one for 2 machines with 4 processes each" in soon_lost(first)


def test_machine_0_does_not_answer(port, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", module.timedelta(seconds=1))
    with pytest.raises(UserError, match=f"127.0.0.1:{port}"):
        Machines("127.0.0.1", port, 2, 1, 1)
