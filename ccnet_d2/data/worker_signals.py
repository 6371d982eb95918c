"""Loader workers that leave SIGTERM to the process that trains."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CAN_WAIT = hasattr(signal, "sigwaitinfo")  # not on macOS


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Within the block, SIGTERM is blocked in this thread and in all that it starts: workers, for which see below.

    A worker that blocks it for itself is too late for threads that libraries start when a process is forked.
    """
    if not _CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_sigterm_to_parent(worker: int, then: Callable[[int], object] | None = None) -> None:
    """A `worker_init_fn`: from here on, only the parent's own SIGTERM ends this worker.

    `timeout`, job schedulers and service managers send SIGTERM to all processes of a run at once. A worker that dies
    of it takes the training with it, which then has no step left at whose end it could save.

    Args:
        worker: number of the worker.
        then: another `worker_init_fn`, called afterwards.
    """
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process()  # not the server that may have forked this one
        assert parent is not None, "called in no worker"
        threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()
    if then is not None:
        then(worker)


def _end_when_told_by(parent: int) -> None:
    # A handler would not know who sent the signal.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
