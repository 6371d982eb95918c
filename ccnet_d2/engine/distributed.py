"""This process among the others: process groups, torchrun's environment, and the model shared by all."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.utils import comm
from torch import nn

from ccnet_d2.compat import ddp_options
from ccnet_d2.errors import UserError
from ccnet_d2.layers.sync_batch_norm import sync_batch_norm_on_cpu

from .network import choose_interface

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others in one operation: Detectron2's, since the main process evaluates alone."""

_create_ddp_model = defaults.create_ddp_model
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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
        if any(name not in os.environ for name in _TORCHRUN):
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
def joined_processes(
    device: str,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    machine_rank: int,
    store: dist.Store | None = None,
    timeout: timedelta = TIMEOUT,
) -> Iterator[None]:
    """Within the block, `torch.distributed` and Detectron2's `comm` know all processes.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, on the GPU with the number `local_rank`).
        rank: of this process among all.
        world_size: number of processes.
        local_rank: of this process on its machine.
        machine_rank: of the machine.
        store: where the processes find each other; default: as torchrun's variables say.
        timeout: of each operation.
    """
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        store=store,
        timeout=timeout,
    )
    # Detectron2's way of sending objects, on which newer versions of torch warn in every process.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
    try:
        comm.synchronize()  # an operation of all before there are groups of some
        machines: list[Any] = [None] * world_size
        dist.all_gather_object(machines, machine_rank)
        for machine in sorted(set(machines)):
            ranks = [i for i, other in enumerate(machines) if other == machine]
            group = dist.new_group(ranks, timeout=timeout)
            if machine == machine_rank:
                comm._LOCAL_PROCESS_GROUP = group
        yield
        # After an error the connections stay: closed, they would be the first error that the others see.
        dist.destroy_process_group()
    finally:
        comm._LOCAL_PROCESS_GROUP = None


def is_lost_connection(error: BaseException) -> bool:
    """Whether the error says that another process cannot be reached, and so is hardly the first of a run."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection "))


@contextmanager
def joined_torchrun(process: TorchrunProcess, device: str) -> Iterator[None]:
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
    with joined_processes(
        device,
        rank=process.rank,
        world_size=process.world_size,
        local_rank=process.local_rank,
        machine_rank=process.machine_rank,
    ):
        yield


def share_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    """The model in a `DistributedDataParallel`, on GPUs or CPUs; the model itself where there is one process.

    Synchronised batch norm then works on CPUs too.

    Args:
        model: the same in all processes; starts with the main process's weights everywhere.
        fp16_compression: send gradients in fp16.
        kwargs: of `DistributedDataParallel`.
    """
    if comm.get_world_size() == 1:
        return model
    if next(model.parameters()).device.type == "cpu":
        sync_batch_norm_on_cpu(model)
        kwargs["device_ids"] = None
    return _create_ddp_model(model, fp16_compression=fp16_compression, **ddp_options(kwargs))


def own_model(model: nn.Module) -> nn.Module:
    """The model without its `DistributedDataParallel`, whose forward may wait for the other processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@torch.no_grad()
def copy_buffers_from_main_process(model: nn.Module) -> None:
    """Give all processes the main process's buffers, which are those that checkpoints hold.

    Running statistics of batch norm that is not synchronised differ between processes; each would evaluate its share
    of the images with a slightly different network.
    """
    if comm.get_world_size() == 1:
        return
    for buffer in model.buffers():
        values = buffer.contiguous()
        dist.broadcast(values, src=0)
        buffer.copy_(values)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    return any(comm.all_gather(bool(flag)))


@contextmanager
def detectron2_shares_models() -> Iterator[None]:
    """Within the block, Detectron2's `DefaultTrainer` shares its model by `share_model`, so also on CPUs."""
    theirs = defaults.create_ddp_model
    defaults.create_ddp_model = share_model
    try:
        yield
    finally:
        defaults.create_ddp_model = theirs


def check_batch_size(total_batch_size: int | None, key: str = "dataloader.train.total_batch_size") -> None:
    """
    Raises:
        UserError: the batch cannot be split evenly over the processes.
    """
    processes = comm.get_world_size()
    if total_batch_size is not None and total_batch_size % processes:
        raise UserError(
            f"{key} {total_batch_size} is the batch of all processes together and cannot be split over "
            f"{processes}: make it a multiple of {processes}."
        )


def check_same_start(start_iter: int, output_dir: str) -> None:
    """
    Raises:
        UserError: processes would start at different iterations, because they see different checkpoints.
    """
    starts = comm.all_gather(start_iter)
    if len(set(starts)) > 1:
        other = next(rank for rank, start in enumerate(starts) if start != starts[0])
        raise UserError(
            f"Process 0 goes on from iteration {starts[0]} and process {other} from iteration {starts[other]}: "
            f"the output directory {output_dir} must be one folder that all machines share."
        )


class ElasticRun:
    """Remembers in the output directory which torchrun run trains there, so that a restart goes on by itself.

    torchrun starts all processes anew after a failure, and when machines come or go; in the latter case it does not
    count that as a restart.
    """

    def __init__(self, process: TorchrunProcess | None, output_dir: str | os.PathLike[str]) -> None:
        """
        Args:
            process: None for a run without torchrun, which is never a restart.
            output_dir: of the run.
        """
        self._process = process
        self._path = Path(output_dir) / "elastic_run_id"

    def is_restart(self) -> bool:
        """Whether this run was here before and did not end; all processes must ask, and get one answer."""
        if self._process is None:
            return False
        here = self._process.restarts > 0
        if self._process.run_id != "none" and self._path.is_file():
            here = here or self._path.read_text().strip() == self._process.run_id
        return any_process(here)

    def begin(self) -> None:
        """Note that the run is under way."""
        if self._process is not None and comm.is_main_process():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(self._process.run_id + "\n")

    def end(self) -> None:
        """Note that the run is complete: the next one of the same id is a new one."""
        if self._process is not None and comm.is_main_process():
            self._path.unlink(missing_ok=True)
