"""When memory runs out: what says so, and what is done about it."""

from __future__ import annotations

import gc
import logging

import torch

__all__ = ["MEMORY_ERRORS", "is_out_of_memory", "tell_and_free"]

logger = logging.getLogger(__name__)

MEMORY_ERRORS = (RuntimeError, MemoryError)
"""What to catch; `is_out_of_memory` tells those that are meant."""

# torch has a class of its own for its GPU allocator alone.
_PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",  # cuDNN, cuBLAS
    "could not create a memory",  # oneDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch on any device, of a library below it, or of Python says that memory ran out."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def tell_and_free(what: str, instead: str) -> None:
    """Log what did not fit and what is done instead, and give back what the failed attempt held."""
    gc.collect()  # errors and the frames they came through refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("Out of memory with %s; going on with %s.", what, instead)
