"""Two processes on CPUs: interrupted, resumed, and bit-identical; the random state of each is saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_and_resume import differences, final_state

SMALL_RUN = Path(__file__).with_name("small_run.py")
MINUTES = 4

pytestmark = pytest.mark.slow


def start(output, *options):
    command = [
        sys.executable,
        "-m",
        "ccnet_d2.engine.command_line",
        "--config-file",
        SMALL_RUN,
        "--num-processes",
        "2",
    ]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *sorted([f"train.output_dir={output}", *options])],  # flags first
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(process, output):
    assert process.wait(60 * MINUTES) == 0, output.with_suffix(".log").read_text()[-3000:]


def wait_for_checkpoint(process, output):
    end = time.monotonic() + 60 * MINUTES
    while not (output / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < end, output.with_suffix(".log").read_text()[
            -3000:
        ]
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes(dataset, tmp_path, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(whole), whole)
    process = start(parts)
    wait_for_checkpoint(process, parts)
    process.send_signal(number)
    status = process.wait(60 * MINUTES)
    if not (parts / "model_final.pth").exists():
        assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    time.sleep(1)  # the processes of a supervisor that was killed end by themselves
    finish(start(parts, "--resume", "dataloader.train.num_workers=1"), parts)
    state = final_state(whole)
    assert len(state["trainer"]["processes"]) == 2
    random = [process["random"]["cpu"] for process in state["trainer"]["processes"]]
    assert not random[0].equal(random[1])
    assert differences(final_state(parts), state) == []
