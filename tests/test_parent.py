"""Processes that end with the one that started them."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ccnet_d2 import parent

CHILD = f"""
import os, runpy, sys, time
runpy.run_path({parent.__file__!r})["end_with_parent"](int(sys.argv[1]))
print("goes on", os.getpid(), flush=True)
time.sleep(100)
"""
START = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}, sys.argv[1] or str(os.getpid())])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


def start(*prefix, number=""):
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", START, number],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_ends_with_its_parent():
    with start() as starter:
        words, _, pid = starter.stdout.readline().strip().rpartition(" ")
        assert words == "goes on" and is_running(pid)
        starter.kill()
        end = time.monotonic() + 10
        while is_running(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(pid)


def test_a_parent_that_died_before():
    with start(number="1") as starter:  # not the one that started it: as where init took it over
        assert starter.stdout.read() == ""


def test_the_first_process_of_a_container_is_a_parent_like_others():
    container = ("unshare", "--user", "--map-root-user", "--pid", "--kill-child", "--fork")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*container, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs unshare and the right to use it")
    with start(*container) as starter:
        assert starter.stdout.readline().startswith("goes on")
        starter.kill()
