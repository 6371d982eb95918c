"""Starting one process for each GPU, or several on CPUs, and ending all of them when one fails.

Detectron2's `launch` knows GPUs alone, and waits for the processes of its own machine only: where a process on
another machine dies, NCCL goes on waiting. Here a supervisor on each machine watches its processes, and the supervisors
tell each other through a store that the first machine keeps.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import torch

from ccnet_d2.errors import UserError

from .child_process import Place, Report, run_child
from .distributed import TIMEOUT
from .machines import MachineLostError, Machines

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 1.0
_STOP_SECONDS = 5.0
_CAUSE_ORDER = {"user": 0, "fault": 0, "lost": 1, "exit": 2}


class ProcessFailedError(UserError):
    """A process of a distributed run failed or was killed; the message says which and how."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        per_machine: processes on each machine.
        device: "cuda" (one GPU for each process, NCCL) or "cpu" (gloo).
        machines: number of machines.
        machine_rank: which of them this is, from 0.
        url: tcp://HOST:PORT of machine 0, where all machines meet; "auto" for one machine.
    """

    per_machine: int
    device: str = "cpu"
    machines: int = 1
    machine_rank: int = 0
    url: str = "auto"

    def __post_init__(self) -> None:
        if self.per_machine < 1 or self.machines < 1:
            raise UserError(
                f"A run needs at least one machine and one process on it, got {self.machines} and {self.per_machine}."
            )
        if not 0 <= self.machine_rank < self.machines:
            raise UserError(
                f"--machine-rank {self.machine_rank} is not one of {self.machines} machines: it counts from 0 to "
                f"{self.machines - 1}."
            )
        if self.url == "auto" and self.machines > 1:
            raise UserError(
                "Several machines need a place to meet: give all of them --dist-url tcp://HOST:PORT, with the host of "
                "machine 0 and a free port there."
            )
        if self.device == "cuda" and torch.cuda.device_count() < self.per_machine:
            raise UserError(
                f"--num-gpus {self.per_machine}, but torch sees {torch.cuda.device_count()} GPUs."
            )
        self.address()

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.machines * self.per_machine

    def address(self) -> tuple[str, int]:
        """Host and port of the store; port 0 for any free one."""
        if self.url == "auto":
            return "127.0.0.1", 0
        parts = urlsplit(self.url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if parts.scheme != "tcp" or not host or not port:
            raise UserError(f"--dist-url {self.url} is not of the form tcp://HOST:PORT.")
        return host, port


def launch(
    main: Callable[..., Any], processes: Processes, args: Sequence[Any] = (), *, timeout: timedelta = TIMEOUT
) -> None:
    """Call `main(*args)` in every process of a run, on this machine; must be called on all its machines.

    One process alone is this one. Else new ones are started, in which `torch.distributed` and Detectron2's `comm`
    know all of them; `main` and `args` must be picklable. When a process fails or is killed, on any machine, all
    others are ended. SIGTERM is passed on to the processes, which may save and exit.

    Args:
        main: the program.
        processes: how many, and where.
        args: its arguments.
        timeout: of each operation between the processes.

    Raises:
        UserError: a process raised one (any `ValueError` or `FileNotFoundError`).
        ProcessFailedError: a process failed otherwise (its traceback is printed), was killed, or another machine was
            lost.
        SystemExit: the processes exited with a status of their own, for instance after SIGTERM.
    """
    if processes.world_size == 1:
        main(*args)
        return
    host, port = processes.address()
    with Machines(host, port, processes.machines, processes.machine_rank, processes.per_machine) as machines:
        supervisor = _Supervisor(processes, machines)
        supervisor.start(main, tuple(args), timeout)
        supervisor.watch()


@dataclass
class _Child:
    rank: int
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    report: Report | None = None

    def status(self) -> int:
        """As a shell has it: 128 + the signal that killed it."""
        code = self.process.exitcode or 0
        return 128 - code if code < 0 else code

    def killed_by(self) -> int:
        """The signal that killed it, or 0."""
        code = self.process.exitcode
        return -code if code is not None and code < 0 else 0


class _Supervisor:
    """Watches the processes of this machine."""

    def __init__(self, processes: Processes, machines: Machines) -> None:
        self._processes = processes
        self._machines = machines
        self._children: list[_Child] = []
        self._asked_to_stop = 0

    def start(self, main: Callable[..., Any], args: tuple[Any, ...], timeout: timedelta) -> None:
        context = multiprocessing.get_context("spawn")
        threads = 0
        if "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, len(os.sched_getaffinity(0)) // self._processes.per_machine)
        for local_rank in range(self._processes.per_machine):
            ours, theirs = context.Pipe(duplex=False)
            rank = self._processes.machine_rank * self._processes.per_machine + local_rank
            place = Place(
                device=self._processes.device,
                rank=rank,
                world_size=self._processes.world_size,
                local_rank=local_rank,
                machine_rank=self._processes.machine_rank,
                address=self._machines.address,
                threads=threads,
                timeout=timeout,
                supervisor=os.getpid(),
            )
            # Not daemonic: those may not have children, and data loaders do.
            process = context.Process(target=run_child, args=(theirs, place, main, args), name=f"rank {rank}")
            process.start()
            theirs.close()
            self._children.append(_Child(rank, process, ours))

    def watch(self) -> None:
        """Wait for all processes, or end them when one fails."""
        # Other threads may not handle signals.
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._pass_on) if in_main_thread else None
        try:
            self._wait()
        finally:
            self._end_all()
            if in_main_thread:
                signal.signal(signal.SIGTERM, before)

    def _wait(self) -> None:
        while True:
            running = [child for child in self._children if child.process.exitcode is None]
            if not running:
                break
            wait([child.process.sentinel for child in running] + self._open_pipes(), timeout=_POLL_SECONDS)
            self._read_reports()
            if any(self._failed(child) for child in self._children):
                break
            try:
                self._machines.check()
            except MachineLostError as error:
                self._end_all()
                raise ProcessFailedError(f"{error} The processes of this machine were stopped.") from None
        if any(self._failed(child) for child in self._children):
            self._raise_cause()
        try:
            self._machines.finish()
        except MachineLostError as error:
            raise ProcessFailedError(str(error)) from None
        status = max(child.status() for child in self._children)
        if status:
            raise SystemExit(status)

    def _open_pipes(self) -> list[Any]:
        return [child.pipe for child in self._children if child.report is None and not child.pipe.closed]

    def _read_reports(self) -> None:
        for child in self._children:
            if child.report is None and not child.pipe.closed and child.pipe.poll():
                try:
                    child.report = child.pipe.recv()
                except EOFError:
                    child.pipe.close()

    def _failed(self, child: _Child) -> bool:
        if child.report is not None and child.report.kind != "exit":
            return True
        if child.process.exitcode in (None, 0) or child.report is not None:
            return False
        # Without a handler of its own a process that is asked to stop dies of it.
        return not (self._asked_to_stop and child.killed_by() == self._asked_to_stop)

    def _raise_cause(self) -> None:
        """Tell what failed first: the failures of the others follow from it."""
        end = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < end and any(child.process.exitcode is None for child in self._children):
            time.sleep(0.05)
            self._read_reports()
        killed = [child for child in self._children if child.report is None and self._failed(child)]
        self._end_all()
        if killed:
            child = killed[0]
            message = f"{self._name(child)} {_death(child)}; the others were stopped."
            self._machines.report_failure(message)
            raise ProcessFailedError(message)
        child, report = min(
            ((child, child.report) for child in self._children if child.report is not None),
            key=lambda pair: (_CAUSE_ORDER[pair[1].kind], pair[1].time),
        )
        if report.kind == "user":
            self._machines.report_failure(report.text)
            if report.trace:
                print(report.trace, file=sys.stderr, end="")
            raise UserError(report.text)
        elsewhere = self._machines.failure_elsewhere() if report.kind == "lost" else None
        if elsewhere:
            # Connections to the other machine broke, which says less than that machine does.
            raise ProcessFailedError(f"{elsewhere} The processes of this machine were stopped.")
        print(report.trace, file=sys.stderr, end="")
        message = f"{self._name(child)} failed: {report.text.rstrip('.')}; the others were stopped."
        self._machines.report_failure(message)
        raise ProcessFailedError(message)

    def _name(self, child: _Child) -> str:
        name = f"Process {child.rank} of {self._processes.world_size}"
        if self._processes.machines > 1:
            name += f" (on machine {self._processes.machine_rank})"
        return name

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if self._asked_to_stop:
            raise SystemExit(128 + number)  # asked twice: now
        self._asked_to_stop = number
        for child in self._children:
            if child.process.is_alive():
                child.process.terminate()

    def _end_all(self) -> None:
        for child in self._children:
            if child.process.is_alive():
                child.process.terminate()
        end = time.monotonic() + _STOP_SECONDS
        for child in self._children:
            child.process.join(max(0.0, end - time.monotonic()))
        for child in self._children:
            if child.process.is_alive():  # it waits for a process that is gone
                child.process.kill()
                child.process.join()


def _death(child: _Child) -> str:
    number = child.killed_by()
    if not number:
        return f"ended with status {child.process.exitcode} without telling why"
    with suppress(ValueError):
        name = signal.Signals(number).name
        hint = " (by the system if memory ran out)" if number == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"
    return f"was killed by signal {number}"
