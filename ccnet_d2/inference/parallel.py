"""Writing pictures on several devices at once: a process for each, which takes the next image when it is free."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from omegaconf import DictConfig
from tqdm import tqdm

from ccnet_d2.errors import UserError
from ccnet_d2.parent import end_with_parent

from .batch import BatchResult, PictureJob
from .mode import InferenceMode
from .predictor import Predictor

__all__ = ["write_pictures_on"]

_DONE, _MISTAKE, _FAULT = range(3)


def write_pictures_on(
    devices: Sequence[torch.device],
    load: Callable[[], DictConfig],
    checkpoint: str | os.PathLike[str] | None,
    jobs: Sequence[PictureJob],
    *,
    mode: InferenceMode | None = None,
    progress: bool = True,
) -> BatchResult:
    """`write_pictures` on several devices.

    Args:
        devices: one process runs on each; of more devices than images some stay idle.
        load: gives the run, and is called in every process, so that what its file registers is known there too.
        checkpoint: its weights; default: the run's.
        jobs: see `batch.plan_pictures`.
        mode: see `Predictor`.
        progress: show a progress bar on stderr.

    Returns:
        As of one device, in the order of the jobs.

    Raises:
        UserError: as `Predictor` and `write_pictures` do, or a process was killed; the others are ended then.
        RuntimeError: a process failed; holds its traceback.
    """
    # "spawn": a forked process can use neither CUDA nor OpenMP's threads.
    context = multiprocessing.get_context("spawn")
    upcoming, results = context.Value("l", 0), context.Queue()
    devices = devices[: len(jobs)]
    threads = _threads_each(devices)
    workers = [
        context.Process(
            target=_work,
            args=(os.getpid(), str(device), threads, load, checkpoint, mode, list(jobs), upcoming, results),
            daemon=True,
        )
        for device in devices
    ]
    problems: dict[int, str | None] = {}
    with _ended(workers), tqdm(total=len(jobs), unit="image", disable=not progress) as bar:
        while len(problems) < len(jobs):
            kind, content = _next_result(results, workers, devices)
            if kind == _MISTAKE:
                raise UserError(content)
            if kind == _FAULT:
                raise RuntimeError(content)
            index, problem = content
            problems[index] = problem
            bar.update()
    result = BatchResult()
    for index, job in enumerate(jobs):
        result.add(job, problems[index])
    return result


def _threads_each(devices: Sequence[torch.device]) -> int:
    """The threads that torch may use here, shared among the processes on the CPU.

    Not the machine's cores, of which a job may have been given a few (affinity, OMP_NUM_THREADS).
    """
    return max(torch.get_num_threads() // max(sum(device.type == "cpu" for device in devices), 1), 1)


def _work(
    parent: int,
    device: str,
    threads: int,
    load: Callable[[], DictConfig],
    checkpoint: str | os.PathLike[str] | None,
    mode: InferenceMode | None,
    jobs: list[PictureJob],
    upcoming: Any,
    results: Any,
) -> None:
    # Ended by the parent, or with it: leave through the "finally"s, which remove half-written files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent then ends this one as above
    try:
        torch.set_num_threads(threads)
        cfg = load()
        cfg.train.device = device
        predictor = Predictor(cfg, checkpoint, mode=mode)
        while True:
            with upcoming.get_lock():
                index = upcoming.value
                upcoming.value += 1
            if index >= len(jobs):
                return
            results.put((_DONE, (index, jobs[index].problem(predictor))))
    except (ValueError, FileNotFoundError) as error:  # what `one_sentence_errors` takes for the user's
        results.put((_MISTAKE, str(error)))
    except Exception:
        results.put((_FAULT, f"the process on {device} failed:\n{traceback.format_exc()}"))


def _next_result(results: Any, workers: Sequence[Any], devices: Sequence[torch.device]) -> tuple[int, Any]:
    while True:
        dead = [index for index, worker in enumerate(workers) if worker.exitcode not in (None, 0)]
        all_ended = all(worker.exitcode is not None for worker in workers)
        try:
            # What a process that has ended by itself sent is on its way already.
            return results.get(timeout=5 if all_ended else 0.2)
        except queue.Empty:
            pass
        if dead or all_ended:
            index = dead[0] if dead else 0
            raise UserError(
                f"the process on {devices[index]} was ended from outside (exit code {workers[index].exitcode}); a "
                "lack of memory does that: use fewer devices, or --mode slide for large images."
            )


@contextlib.contextmanager
def _ended(workers: Sequence[Any]) -> Iterator[None]:
    """Start the processes, and leave none behind."""
    try:
        for worker in workers:
            worker.start()
        yield
        for worker in workers:
            worker.join(timeout=30)
    finally:
        for worker in workers:
            if worker.pid is not None and worker.exitcode is None:
                worker.terminate()
                worker.join()
