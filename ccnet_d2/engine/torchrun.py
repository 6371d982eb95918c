"""A process that torchrun started: what it is told, and starts after a failure."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.rendezvous import rendezvous

from ccnet_d2.atomic_file import atomic_write_text
from ccnet_d2.errors import UserError

from .distributed import TIMEOUT, any_process, joined_processes
from .network import choose_interface

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class TorchrunProcess:
    """What torchrun tells a process that it started.

    Attributes:
        rank: of this process among all.
        world_size: number of processes.
        local_rank: of this process on its machine.
        machine_rank: of the machine.
        restarts: how often torchrun has started all processes anew after a failure.
        run_id: torchrun's --rdzv-id; "none" unless given.
        address: host of the rendezvous.
    """

    rank: int
    world_size: int
    local_rank: int
    machine_rank: int
    restarts: int
    run_id: str
    address: str

    @classmethod
    def from_environment(cls) -> "TorchrunProcess | None":
        """None unless torchrun (or another launcher that sets its variables) started this process."""
        if any(name not in os.environ for name in _VARIABLES):
            return None
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            machine_rank=int(os.environ.get("GROUP_RANK", "0")),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            run_id=os.environ.get("TORCHELASTIC_RUN_ID", "none"),
            address=os.environ["MASTER_ADDR"],
        )


@contextmanager
def joined_torchrun(process: TorchrunProcess, device: str, *, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """`joined_processes` for a process that torchrun started.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if device == "cuda" and process.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started process {process.local_rank + 1} of this machine, but torch sees "
            f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node, or add train.device=cpu."
        )
    choose_interface(process.address)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    with joined_processes(
        device,
        rank=process.rank,
        world_size=process.world_size,
        local_rank=process.local_rank,
        machine_rank=process.machine_rank,
        store=dist.PrefixStore(agree_on_round(store, process.rank, process.world_size, timeout), store),
        timeout=timeout,
    ):
        yield


def agree_on_round(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the processes of this start have in common, and none of an earlier start.

    torchrun goes on with one store when it starts processes anew, and the addresses of the dead are still in it. When
    machines come or go, it does not even count the start. So each process names itself anew, process 0 proposes a
    round of the names it finds, and again until all have found themselves in it.

    Raises:
        TimeoutError: not all processes came in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    name = uuid.uuid4().hex
    store.set(f"name/{rank}", name)
    others = [str(other) for other in range(1, world_size)]
    while time.monotonic() < end:
        if rank == 0:
            if not others or store.check([f"name/{other}" for other in others]):
                names = [store.get(f"name/{other}").decode() for other in others]
                store.set("round", " ".join([name, *names]))
                if not others or store.check([f"here/{name}/{other}" for other in names]):
                    return name
        elif store.check(["round"]):
            proposed, *names = store.get("round").decode().split()
            if name in names:
                store.set(f"here/{proposed}/{name}", "")
                return proposed
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"Process {rank} of {world_size} did not find the others within {timeout}.")


class ElasticRun:
    """Remembers in the output directory which torchrun run trains there, so that a restart goes on by itself.

    torchrun starts all processes anew after a failure, and when machines come or go; in the latter case it does not
    count that as a restart. What lay in the directory when the run began is of another run, from which a restart does
    not go on.
    """

    def __init__(self, process: TorchrunProcess, output_dir: str | os.PathLike[str]) -> None:
        """
        Args:
            process: this one.
            output_dir: of the run.
        """
        self._process = process
        self._folder = Path(output_dir)
        self._path = self._folder / "elastic_run_id"

    def is_restart(self) -> bool:
        """Whether this run was here before, has saved and did not end; all processes must ask, and get one answer."""
        note = self._note()
        return any_process(note is not None and note[1:] != self._last_checkpoint())

    def begin(self) -> None:
        """Note that the run is under way."""
        if comm.is_main_process() and self._note() is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._path, "\n".join([self._process.run_id, *self._last_checkpoint()]) + "\n")

    def end(self) -> None:
        """Note that the run is complete: the next one of the same id is a new one."""
        if comm.is_main_process():
            self._path.unlink(missing_ok=True)

    def _note(self) -> list[str] | None:
        """What this run wrote at an earlier start, if it did."""
        if self._process.run_id == "none" and self._process.restarts == 0:
            return None  # all runs without a name have this one
        try:
            note = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return None
        return note if note[:1] == [self._process.run_id] else None

    def _last_checkpoint(self) -> list[str]:
        """What tells the last checkpoint from one that is saved later; empty where there is none."""
        try:
            tag = self._folder / "last_checkpoint"
            return [tag.read_text(errors="replace").strip(), str(tag.stat().st_mtime_ns)]
        except FileNotFoundError:
            return []
