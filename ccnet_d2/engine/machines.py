"""The machines of a run, watching each other through a store that the first one keeps."""

import threading
import time
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from ccnet_d2.errors import UserError

CONNECT_TIMEOUT = timedelta(minutes=10)
_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 20.0
_FAREWELL_SECONDS = 3.0
_REPORT_SECONDS = 3.0
_FAILURE = "failure"


class MachineLostError(Exception):
    """A process failed on another machine, or that machine is silent; the message is a sentence."""


class Machines:
    """Keeps the store of a run (machine 0), or reaches it, and tells when another machine fails.

    A context manager. With one machine there is the store alone.
    """

    def __init__(self, host: str, port: int, machines: int, machine_rank: int, per_machine: int) -> None:
        """
        Args:
            host: of machine 0.
            port: of the store there; 0 for any free one, with one machine.
            machines: number of machines.
            machine_rank: of this one.
            per_machine: processes on each; all machines must agree.

        Raises:
            UserError: the port is taken, machine 0 does not answer, or two machines have one rank or differ in their
                numbers.
        """
        self._machines = machines
        self._rank = machine_rank
        self._host = host
        self._store = self._open(host, port)
        self.address = (host, self._store.port)
        self._lost: str | None = None
        self._last_contact = time.monotonic()
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        if machines > 1:
            self._introduce(per_machine)
            self._watcher = threading.Thread(target=self._watch, name="machines", daemon=True)
            self._watcher.start()

    def __enter__(self) -> "Machines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, SystemExit) and self._machines > 1:
            self.report_failure(f"Machine {self._rank} stopped.")
            if self._rank == 0:
                self._wait_for_farewells(_FAREWELL_SECONDS)
        self._over.set()

    def check(self) -> None:
        """
        Raises:
            MachineLostError: another machine failed or is silent.
        """
        if self._watcher is None:
            return
        silence = time.monotonic() - self._last_contact
        if self._lost is None and silence > _SILENCE_SECONDS:
            self._lost = f"Machine 0 ({self._host}) has been silent for {silence:.0f} s."
        if self._lost is not None:
            raise MachineLostError(self._lost)

    def report_failure(self, message: str) -> None:
        """Tell the other machines why this one stops; the first report counts."""
        if self._machines == 1 or self._lost is not None:
            return
        try:
            self._store.compare_set(_FAILURE, "", f"{self._rank}:{message}")
        except RuntimeError:  # nobody is there to be told
            self._lost = self._unreachable()

    def failure_elsewhere(self) -> str | None:
        """Why another machine stopped, if one did; waits a moment for its report."""
        if self._watcher is None:
            return None
        self._watcher.join(_REPORT_SECONDS)  # which ends when it hears of a failure
        return self._lost

    def finish(self) -> None:
        """Call when this machine's processes are done; machine 0 waits for the others, which need its store.

        Raises:
            MachineLostError: another machine failed or is silent.
        """
        if self._watcher is None:
            return
        try:
            self._store.set(f"left/{self._rank}", "done")
        except RuntimeError as error:
            raise MachineLostError(self._unreachable()) from error
        if self._rank == 0:
            while not self._store.check(self._others("left")):
                self.check()
                time.sleep(0.1)

    def _open(self, host: str, port: int) -> dist.TCPStore:
        first = self._rank == 0
        try:
            return dist.TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
        except RuntimeError as error:
            if first:
                raise UserError(
                    f"Port {port} of {host} cannot be used: {_reason(error)}; choose another one in --dist-url."
                ) from error
            minutes = CONNECT_TIMEOUT.total_seconds() / 60
            raise UserError(
                f"Machine 0 did not answer at {host}:{port} within {minutes:.0f} minutes: is it running, and is this "
                "its address?"
            ) from error

    def _introduce(self, per_machine: int) -> None:
        numbers = f"{self._machines} machines with {per_machine} processes each"
        agreed = self._store.compare_set("numbers", "", numbers).decode()
        if agreed != numbers:
            message = f"Another machine was started for {agreed}, this one for {numbers}."
            if self._store.add(f"rank/{self._rank}", 0) == 0:  # the others wait for it
                self.report_failure(message)
            raise UserError(message)
        if self._store.add(f"rank/{self._rank}", 1) > 1:
            raise UserError(
                f"Two machines were started with --machine-rank {self._rank}: give each one its own."
            )

    def _unreachable(self) -> str:
        return f"Machine 0 ({self._host}) cannot be reached any more."

    def _others(self, what: str) -> list[str]:
        return [f"{what}/{rank}" for rank in range(self._machines) if rank != self._rank]

    def _wait_for_farewells(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self._store.check(self._others("left")):
                    return
            except RuntimeError:
                return
            time.sleep(0.1)

    def _watch(self) -> None:
        """Beats, and listens for those of the others; a thread, since a broken network answers nothing."""
        beats = dict.fromkeys((rank for rank in range(self._machines) if rank != self._rank), (0, 0.0))
        while not self._over.is_set():
            try:
                self._exchange(beats)
            except RuntimeError:
                if not self._over.is_set():
                    self._lost = self._unreachable()
                return
            if self._lost is not None:
                return
            self._over.wait(_BEAT_SECONDS)

    def _exchange(self, beats: dict[int, tuple[int, float]]) -> None:
        self._store.add(f"beat/{self._rank}", 1)
        if self._store.check([_FAILURE]):
            failed, _, message = self._store.get(_FAILURE).decode().partition(":")
            if int(failed) != self._rank:
                self._lost = f"Machine {failed} failed: {message}"
                self._store.set(f"left/{self._rank}", "stopped")
        now = time.monotonic()
        for rank, (count, since) in beats.items():
            heard = self._store.add(f"beat/{rank}", 0)
            if heard != count:
                beats[rank] = (heard, now)
            elif count and now - since > _SILENCE_SECONDS and not self._store.check([f"left/{rank}"]):
                self._lost = f"Machine {rank} has been silent for {now - since:.0f} s."
        self._last_contact = time.monotonic()


def _reason(error: Exception) -> str:
    text = str(error)
    return "it is in use" if "EADDRINUSE" in text or "in use" in text else text.splitlines()[0]
