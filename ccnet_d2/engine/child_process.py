"""A process that a supervisor started: it joins the others, calls the program, and tells how it ended."""

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from ccnet_d2.parent import end_with_parent

from .distributed import is_lost_connection, joined_processes
from .network import choose_interface
from .user_errors import USER_ERRORS, sentence_of


@dataclass
class Report:
    """How a process ended: "exit" with a status, a "user" error, a "fault" of the program, or another one "lost"."""

    kind: str
    text: str
    trace: str = ""
    status: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
        device: "cuda" or "cpu".
        rank: among all processes.
        world_size: number of all processes.
        local_rank: on its machine.
        machine_rank: of the machine.
        address: host and port of the store where they meet.
        threads: for torch on the CPU; 0 to leave them as they are.
        timeout: of each operation between the processes.
        supervisor: number of the process that started it.
    """

    device: str
    rank: int
    world_size: int
    local_rank: int
    machine_rank: int
    address: tuple[str, int]
    threads: int
    timeout: timedelta
    supervisor: int


def run_child(pipe: Connection, place: Place, main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Call `main(*args)` among the others; a `Report` goes into the pipe unless all went well."""
    end_with_parent(place.supervisor)
    # A spawned process spawns its own by default. Loader workers are forked (fork_workers) as in a run of one process:
    # spawned, they would have to be sent, pickled, what a config file defines.
    multiprocessing.set_start_method(None, force=True)
    if place.threads:
        torch.set_num_threads(place.threads)
        os.environ["OMP_NUM_THREADS"] = str(place.threads)
    report = Report("exit", "")
    try:
        _join_and_call(place, main, args)
    except USER_ERRORS as error:
        trace = traceback.format_exc() if os.environ.get("CCNET_TRACEBACK") == "1" else ""
        report = Report("user", sentence_of(error), trace, status=1)
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            report.status = exit_.code or 0
        else:  # a message, which Python would print at its own end
            print(exit_.code, file=sys.stderr)
            report.status = 1
    except KeyboardInterrupt:
        report.status = 128 + signal.SIGINT
    except BaseException as error:  # whatever it is, the supervisor tells it
        kind = "lost" if is_lost_connection(error) else "fault"
        report = Report(kind, _one_line(error), traceback.format_exc(), status=1)
    report.time = time.monotonic()
    if report.status:
        with suppress(OSError):
            pipe.send(report)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if report.status:
        # An ordinary exit may wait for threads that wait for the other processes.
        os._exit(report.status)


def _join_and_call(place: Place, main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    host, port = place.address
    choose_interface(host)
    store = dist.TCPStore(host, port, is_master=False, timeout=place.timeout)
    with joined_processes(
        place.device,
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        machine_rank=place.machine_rank,
        store=dist.PrefixStore("processes", store),
        timeout=place.timeout,
    ):
        main(*args)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
