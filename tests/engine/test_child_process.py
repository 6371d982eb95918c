"""How a process ends and what it tells the one that started it, without others that it would join."""

import os
import time
from datetime import timedelta

import pytest
import torch

from ccnet_d2.engine import child_process
from ccnet_d2.engine.child_process import Place, run_child


class Ended(BaseException):
    """In place of the end of the process."""


class Pipe(list):
    send = list.append


class BrokenPipe:
    def send(self, report):
        raise BrokenPipeError


@pytest.fixture
def run(monkeypatch):
    """Calls a program as such a process; gives its status and what it reported."""

    def end(status):
        raise Ended(status)

    parents = []
    monkeypatch.setattr(child_process, "end_with_parent", parents.append)
    monkeypatch.setattr(child_process, "_join_and_call", lambda place, main, args: main(*args))
    monkeypatch.setattr(child_process.logging, "shutdown", lambda: None)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = torch.get_num_threads()

    def call(main, *args, pipe=None, threads=0):
        pipe = Pipe() if pipe is None else pipe
        place = Place("cpu", 1, 2, 1, 0, ("127.0.0.1", 1), threads, timedelta(seconds=1), 4711)
        status = 0
        try:
            run_child(pipe, place, main, args)
        except Ended as ended:
            (status,) = ended.args
        assert parents == [4711]
        parents.clear()
        return status, pipe

    yield call
    torch.set_num_threads(before)


def fail(error):
    raise error


def test_nothing_is_told_of_a_process_that_did_its_work(run):
    done = []
    assert run(done.append, 3) == (0, []) and done == [3]
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("error", "status", "kind", "text", "traced"),
    [
        (ValueError("The image 'a.png'\nis cut off."), 1, "user", "The image 'a.png'\nis cut off.", False),
        (RuntimeError("first\nsecond"), 1, "fault", "RuntimeError: first", True),
        (AssertionError(), 1, "fault", "AssertionError", True),
        (
            RuntimeError("[gloo] Connection closed by peer"),
            1,
            "lost",
            "RuntimeError: [gloo] Connection",
            True,
        ),
        (KeyboardInterrupt(), 130, "exit", "", False),
        (SystemExit(143), 143, "exit", "", False),
        (SystemExit("no room"), 1, "exit", "", False),
    ],
)
def test_what_is_told(run, error, status, kind, text, traced):
    begun = time.monotonic()
    ended, (report,) = run(fail, error)
    assert (ended, report.status, report.kind) == (status, status, kind)
    assert report.text.startswith(text) and ("in fail" in report.trace) == traced
    assert begun <= report.time <= time.monotonic()


@pytest.mark.parametrize("code", [None, 0])
def test_an_exit_without_a_status_is_none(run, code):
    assert run(fail, SystemExit(code)) == (0, [])


def test_what_an_exit_says_is_printed(run, capsys):
    """As Python does at its own end."""
    run(fail, SystemExit("no room"))
    assert capsys.readouterr().err == "no room\n"


def test_the_status_is_kept_where_nobody_listens(run):
    assert run(fail, SystemExit(3), pipe=BrokenPipe())[0] == 3


def test_the_traceback_of_a_users_error_is_for_those_who_ask(run, monkeypatch):
    monkeypatch.setenv("CCNET_TRACEBACK", "1")
    assert "in fail" in run(fail, ValueError("x"))[1][0].trace


def test_threads_are_for_libraries_and_children_too(run):
    seen = []
    run(lambda: seen.append((torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])), threads=3)
    assert seen == [(3, "3")]
