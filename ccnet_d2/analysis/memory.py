"""How much memory tensors take, followed allocation by allocation, on real and on fake tensors alike."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """Within `with LiveMemory() as memory:` the bytes that new tensors hold: `memory.live` now, `memory.peak` at most.

    Every storage counts once, from the operator that makes it until the last tensor on it is gone; tensors from
    before do not count. What a kernel takes for itself meanwhile, and the rounding of an allocator, are not seen.
    Works in one thread: for the backward pass that is the CPU's (fake CPU tensors included), not a GPU's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = (args, kwargs or {})
        # An operator may return its argument, which is no new memory.
        before = {id(storage) for storage in _storages(arguments)}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in before and storage not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = size
                self.live += size
                weakref.finalize(storage, self._free, size).atexit = False
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept_for_backward(function: Callable[[], Any], excluded: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """The bytes that autograd keeps after a forward pass, until the backward pass has used them.

    Args:
        function: the forward pass; its result has to keep its graph.
        excluded: tensors that are there anyway: parameters, buffers and the input.

    Returns:
        Bytes, every storage counted once, and what the function returned.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    for tensor in excluded:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()), result
