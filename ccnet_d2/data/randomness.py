"""Random numbers that depend on a place in the run alone, and the state of the generators as data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["GeneratorStates", "seed_of", "seeded"]


def seed_of(*key: int) -> int:
    """A 64-bit seed for a key of integers; keys that differ in anything give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class GeneratorStates:
    """States of the global generators of Python, NumPy and torch; on a GPU, also that of the current one.

    Attributes:
        python: as `random.getstate` gives it.
        numpy: as `numpy.random.get_state` gives it.
        cpu: uint8 tensor.
        cuda: uint8 tensor, or None where no GPU is used.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None = None

    @classmethod
    def capture(cls, *, cuda: bool = False) -> GeneratorStates:
        """The states now."""
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.default_generator.get_state(),
            torch.cuda.get_rng_state() if cuda else None,
        )

    def restore(self) -> None:
        """Let the generators go on from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    def as_data(self) -> dict[str, Any]:
        """Numbers, strings, lists and tensors, which `from_data` understands."""
        version, words, gauss = self.python
        name, keys, *rest = self.numpy
        return {
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
            "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *(float(value) for value in rest)],
            "cpu": self.cpu,
            "cuda": self.cuda,
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> GeneratorStates:
        """The states that `as_data` described."""
        version, words, gauss = data["python"]
        name, keys, position, has_gauss, cached = data["numpy"]
        return cls(
            (version, tuple(words.tolist()), gauss),
            (name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached),
            data["cpu"],
            data["cuda"],
        )


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within, the global generators of Python, NumPy and torch (CPU) start from `key`; then they go on as before.

    Whatever draws from them is covered: Detectron2's augmentations, those of this package, and any mapper's own.
    GPU generators are left alone.
    """
    before = GeneratorStates.capture()
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        before.restore()
