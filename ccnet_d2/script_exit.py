"""How scripts end: with the status of their main function, quietly where nobody reads what they print."""

import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

__all__ = ["exit_with"]

_INTERRUPTED = 128 + 2
"""What a shell reports for a program that SIGINT, the signal 2, ended."""

_CLOSED_PIPE = 128 + 13
"""What a shell reports for a program that SIGPIPE, the signal 13, ended."""


def exit_with(main: Callable[[], Any]) -> NoReturn:
    """End the program with the status that `main` returns.

    Where the reader of its output went away (`demo.py … | head`), or Ctrl-C was pressed, it ends without a traceback
    and with the status that shells report for that.
    """
    try:
        try:
            sys.exit(main())
        finally:
            if sys.stdout is not None:  # as where it was closed from the start (>&-)
                sys.stdout.flush()  # of what was printed last, also by a parser that exits by itself
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # Another pipe or socket that breaks, to a worker for instance, is a fault of the program.
        streams = (sys.stdout, sys.stderr)
        closed = [stream for stream in streams if stream is not None and _nobody_reads(stream)]
        if not closed:
            raise
        for stream in closed:  # which Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_CLOSED_PIPE)


def _nobody_reads(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # errors are reported without being asked for
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
