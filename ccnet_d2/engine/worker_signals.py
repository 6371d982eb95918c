"""Loader workers that leave SIGTERM to the process that trains."""

import os
import signal
import threading
from collections.abc import Callable


def leave_sigterm_to_parent(worker: int, then: Callable[[int], object] | None = None) -> None:
    """A `worker_init_fn`: from here on, only the parent's own SIGTERM ends this worker.

    `timeout`, job schedulers and service managers send SIGTERM to all processes of a run at once. A worker that dies
    of it takes the training with it, which then has no step left at whose end it could save.

    Args:
        worker: number of the worker.
        then: another `worker_init_fn`, called afterwards.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _end_when_told_by(parent: int) -> None:
    # A handler would not know who sent the signal.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
