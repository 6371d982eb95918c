"""Ending with the process that started this one."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)
_LIBC = ctypes.CDLL(None, use_errno=True)


def end_with_parent(parent: int) -> None:
    """Have this process asked to stop (SIGTERM) when the one that started it dies, even by SIGKILL (Linux).

    Args:
        parent: process number of the one that started it, as it knows itself. In a container it may well be 1.
    """
    if sys.platform != "linux":
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before
        os._exit(1)
