"""Machines watching each other through one store; here each is an object of this process."""

import socket
import time

import pytest

from ccnet_d2.engine import machines as module
from ccnet_d2.engine.machines import MachineLostError, Machines
from ccnet_d2.errors import UserError


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(port, monkeypatch):
    """Makes a machine; all that are left are closed."""
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_FAREWELL_SECONDS", 0.2)
    made = []

    def make(rank, machines=2, per_machine=1):
        made.append(Machines("127.0.0.1", port, machines, rank, per_machine))
        return made[-1]

    yield make
    for machine in reversed(made):
        machine.__exit__(None, None, None)
    time.sleep(0.1)  # until the threads have seen it


def lost(machine: Machines, seconds: float = 5.0) -> str:
    """What `check` raises within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            machine.check()
        except MachineLostError as error:
            return str(error)
        time.sleep(0.02)
    return ""


def test_a_failure_is_told_to_all_others_and_the_first_counts(start):
    machines = [start(rank, machines=3) for rank in range(3)]
    machines[1].report_failure("Process 1 of 3 was killed.")
    machines[2].report_failure("Connection closed by peer.")
    assert lost(machines[0]) == lost(machines[2]) == "Machine 1 failed: Process 1 of 3 was killed."
    assert lost(machines[1], 0.3) == ""


def test_leaving_by_an_error_is_a_failure_and_by_an_exit_status_is_not(start):
    first, second = start(0), start(1)
    second.finish()
    second.__exit__(SystemExit, SystemExit(143), None)
    first.finish()  # waits for the second, which has left
    assert lost(first, 0.3) == ""


def test_leaving_by_an_error(start):
    first, second = start(0), start(1)
    second.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert lost(first) == "Machine 1 failed: Machine 1 stopped."


def test_silence(start, monkeypatch):
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.5)
    first, second = start(0), start(1)
    assert lost(first, 1.0) == lost(second, 0.1) == ""
    second._over.set()  # it beats no more
    assert "Machine 1 has been silent" in lost(first)


def test_a_machine_that_is_done_may_be_silent(start, monkeypatch):
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.5)
    first, second = start(0), start(1)
    assert lost(first, 0.5) == ""
    second.finish()
    second._over.set()
    assert lost(first, 1.5) == ""


def test_a_machine_that_hears_nothing_of_machine_0(start, monkeypatch):
    """Its own thread waits for an answer that a broken network does not bring."""
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.5)
    start(0)
    second = start(1)
    second._over.set()
    assert lost(second).startswith("Machine 0 (127.0.0.1) has been silent for ")


def test_two_of_one_rank(start):
    start(0), start(1)
    with pytest.raises(UserError, match="--machine-rank 1"):
        start(1)


def test_a_stray_machine_with_other_numbers_does_not_end_a_run(start):
    first, second = start(0), start(1)
    with pytest.raises(UserError, match="2 machines with 1 processes each"):
        start(1, per_machine=4)
    assert lost(first, 0.3) == lost(second, 0.1) == ""


def test_a_machine_that_is_waited_for_with_other_numbers_does(start):
    first = start(0)
    with pytest.raises(UserError, match="2 machines with 1 processes each"):
        start(1, per_machine=4)
    assert "this one for 2 machines with 4 processes each" in lost(first)


def test_machine_0_does_not_answer(port, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", module.timedelta(seconds=1))
    with pytest.raises(UserError, match=f"127.0.0.1:{port}"):
        Machines("127.0.0.1", port, 2, 1, 1)
