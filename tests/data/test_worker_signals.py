"""Loader workers and SIGTERM."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ccnet_d2.data.worker_signals import leave_sigterm_to_parent, sigterm_held_back

ROOT = Path(__file__).resolve().parents[2]


def note(folder, worker):
    (folder / str(worker)).touch()


at_fork = []  # what threads to start in a new process; cannot be taken back once registered
os.register_at_fork(after_in_child=lambda: [start() for start in at_fork])


def start_thread():
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def values_despite_sigterm(folder, held_back):
    """What a loader gives whose workers get a SIGTERM of another process after its first value; they note in `folder`
    that they have begun."""
    loader = DataLoader(
        torch.arange(100),
        num_workers=2,
        multiprocessing_context="fork",
        worker_init_fn=functools.partial(leave_sigterm_to_parent, then=functools.partial(note, folder)),
    )
    with held_back():
        batches = iter(loader)
    values = [int(next(batches))]
    workers = batches._workers
    end = time.monotonic() + 60
    while len(os.listdir(folder)) < len(workers):  # the other one may not have begun
        assert time.monotonic() < end
        time.sleep(0.01)
    pids = " ".join(str(worker.pid) for worker in workers)
    subprocess.run(["sh", "-c", f"kill -TERM {pids}"], check=True)
    time.sleep(0.3)
    return values + [int(value) for value in batches]


@pytest.mark.parametrize("library", [None, start_thread])
def test_workers_end_only_when_their_parent_says_so(tmp_path, monkeypatch, library):
    """Whether or not a library starts a thread of its own in every new process."""
    if library is not None:
        monkeypatch.setattr(f"{__name__}.at_fork", [library])
    assert values_despite_sigterm(tmp_path, sigterm_held_back) == list(range(100))
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]  # the user's own function ran
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_hold_it_back_by_themselves(tmp_path):
    """In a process of its own, where no library that another test has used starts threads in new processes."""
    program = (
        "import contextlib, pathlib, sys\n"
        f"from {__name__} import values_despite_sigterm\n"
        "print(*values_despite_sigterm(pathlib.Path(sys.argv[1]), contextlib.nullcontext))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split() == [str(value) for value in range(100)], done.stderr


class Hanging:
    """A data set whose second sample never comes."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(1000 * index)
        return index


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_that_hangs_is_ended(method):
    loader = DataLoader(
        Hanging(), num_workers=1, worker_init_fn=leave_sigterm_to_parent, multiprocessing_context=method
    )
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(10)
    # A server's worker has threads that were there before this one could hold the signal back.
    assert worker.exitcode in ([0] if method == "fork" else [0, -signal.SIGTERM])
