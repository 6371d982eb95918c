"""The processes of a comparison, with a program in the place of a training."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from ccnet_d2.engine.comparison import Variant, train_variants
from ccnet_d2.errors import UserError

NAMES = ("a", "b")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Function that has a shell script run for each training; $PLACE is the folder of the test."""

    def use(script):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\nPLACE={tmp_path}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return use


def train(folder):
    variants = [Variant(name, name, (f"name={name}",)) for name in NAMES]
    return train_variants("run.py", variants, folder / "out")


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_trainings_end_with_the_process_that_compares(stand_in, tmp_path, how):
    stand_in("echo $$ > $PLACE/pid.partial; mv $PLACE/pid.partial $PLACE/pid; exec sleep 100")
    process = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path,))
    process.start()
    assert wait_for((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    getattr(process, how)()
    process.join()
    assert wait_for(lambda: not is_running(pid))


def test_a_failure_waits_for_the_other_trainings_to_stop(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})  # both at once
    stand_in(
        "case $* in\n"
        "*name=a*) while [ ! -e $PLACE/waits ]; do sleep 0.05; done; echo error: it broke.; exit 1;;\n"
        "*) trap 'sleep 0.5; touch $PLACE/saved; exit 143' TERM; touch $PLACE/waits; while :; do sleep 0.05; done;;\n"
        "esac"
    )
    with pytest.raises(
        UserError, match=r"^Training of a failed: it broke \(whole output in .*train.log\)\.$"
    ):
        train(tmp_path)
    assert (tmp_path / "saved").exists()
