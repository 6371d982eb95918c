"""This process among the others: process groups, and the model shared by all."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.utils import comm
from torch import nn

from ccnet_d2.compat import ddp_options
from ccnet_d2.errors import UserError
from ccnet_d2.layers.sync_batch_norm import sync_batch_norm_on_cpu

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others in one operation: Detectron2's, since the main process evaluates alone."""

_create_ddp_model = defaults.create_ddp_model


@contextmanager
def joined_processes(
    device: str,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    machine_rank: int,
    store: dist.Store,
    timeout: timedelta = TIMEOUT,
) -> Iterator[None]:
    """Within the block, `torch.distributed` and Detectron2's `comm` know all processes.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, on the GPU with the number `local_rank`).
        rank: of this process among all.
        world_size: number of processes.
        local_rank: of this process on its machine.
        machine_rank: of the machine.
        store: where the processes find each other.
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
        # Closing waits for gloo's threads with Python's lock held; with older versions of torch (seen with 2.6, not
        # with 2.10) for ever, if one needs the lock to free what the last operation sent. They are done in no time.
        time.sleep(0.1)
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
