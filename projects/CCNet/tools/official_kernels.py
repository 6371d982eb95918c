"""Criss-cross attention with the CUDA kernels of the authors' own repository, to measure against.

They are neither part of this project nor built by it. Of https://github.com/speedinghzl/CCNet, branch pytorch-1.1, the
file that holds them needs no PyTorch:

    nvcc -O3 -shared -Xcompiler -fPIC -arch=sm_90 cc_attention/src/ca.cu -o official.so

Here they are called as that repository's functions.py does: into zeroed NCHW tensors, in fp32, 2D, the energies of a
position's H + W - 1 keys in one tensor (B, H + W - 1, H, W), a softmax over them between the kernels.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FUNCTIONS = ("_ca_forward_cuda", "_ca_backward_cuda", "_ca_map_forward_cuda", "_ca_map_backward_cuda")


class OfficialKernels:
    """The functions of a shared library made from ca.cu."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: `path` cannot be loaded, or does not hold the functions.
        """
        library = ctypes.CDLL(str(path.resolve()))
        missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
        if missing:
            raise OSError(f"{path} has no function {missing[0]}: it is not made from the official ca.cu.")
        self._library = library

    def _launch(self, name: str, like: Tensor, *tensors: Tensor) -> None:
        """Calls a function with the sizes of `like` (B, C, H, W) and the tensors' memory, on the current stream."""
        for tensor in tensors:
            if not (tensor.is_cuda and tensor.dtype == torch.float32 and tensor.is_contiguous()):
                raise ValueError("The official kernels take contiguous fp32 tensors on a GPU.")
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if getattr(self._library, name)(*like.shape, *pointers, stream) != 1:
            raise RuntimeError(f"{name} could not be launched: is the library built for this GPU?")

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, C', H, W), (B, C', H, W), (B, C, H, W) -> (B, C, H, W); all fp32 and contiguous."""
        energy: Tensor = _Energies.apply(self, query, key)
        out: Tensor = _Map.apply(self, energy.softmax(dim=1), value)
        return out


class _Energies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: OfficialKernels, query: Tensor, key: Tensor) -> Tensor:
        batch, _, height, width = query.shape
        energy = query.new_zeros(batch, height + width - 1, height, width)
        kernels._launch("_ca_forward_cuda", query, query, key, energy)
        ctx.kernels = kernels
        ctx.save_for_backward(query, key)
        return energy

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor) -> tuple[None, Tensor, Tensor]:
        query, _ = ctx.saved_tensors
        return _gradients(ctx, "_ca_backward_cuda", query, grad_energy)


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: OfficialKernels, weight: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(value)
        kernels._launch("_ca_map_forward_cuda", value, weight, value, out)
        ctx.kernels = kernels
        ctx.save_for_backward(weight, value)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor, Tensor]:
        _, value = ctx.saved_tensors
        return _gradients(ctx, "_ca_map_backward_cuda", value, grad_out)


def _gradients(ctx: Any, name: str, like: Tensor, grad: Tensor) -> tuple[None, Tensor, Tensor]:
    """Of the two saved tensors, by a function of the library; see `OfficialKernels._launch`."""
    first, second = ctx.saved_tensors
    grads = torch.zeros_like(first), torch.zeros_like(second)
    ctx.kernels._launch(name, like, grad.contiguous(), first, second, *grads)
    return None, *grads
