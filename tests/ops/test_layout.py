"""Layouts in memory, and copies between them, against PyTorch's."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from torch import library

from ccnet_d2.ops import compiled
from ccnet_d2.ops.layout import (
    has_even_rows,
    is_channels_last,
    is_dense,
    on_huge_pages,
    to_channels_last,
    to_channels_second,
)

# Remainders of every vector and piece, one channel, one position, and nothing.
SHAPES = [
    (2, 64, 8, 16),
    (1, 67, 9, 15),
    (2, 3, 1, 2),
    (3, 5, 70),
    (1, 9, 2, 3, 7),
    (2, 1, 5, 4),
    (2, 6, 1, 1),
]
EMPTY = [(0, 4, 5, 6), (2, 4, 0, 6), (2, 0, 5, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy(shape, dtype):
    torch.manual_seed(0)
    x = (100 * torch.randn(shape)).to(dtype)
    copy = to_channels_last(x)
    assert torch.equal(copy, x) and is_channels_last(copy)
    assert to_channels_last(copy) is copy
    back = to_channels_second(copy)
    assert torch.equal(back, x) and back.is_contiguous()
    assert to_channels_second(x) is x


@pytest.mark.parametrize("best", ["amx", "avx2", "portable"])
@pytest.mark.parametrize(
    "channels", [512, 520]
)  # whole cache lines, which are written past the caches, and others
def test_large_copy(best, channels, monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", best)
    x = torch.randn(1, channels, 67, 71)
    assert x.nbytes > 8 * 2**20
    copy = to_channels_last(x)
    assert torch.equal(copy, x)
    back = to_channels_second(copy)
    assert torch.equal(back, x) and back.is_contiguous()


def test_copy_of_a_slice():
    x = torch.randn(2, 40, 9, 11)[:, ::2, 1:, ::3]
    assert not is_dense(x)
    copy = to_channels_last(x)
    assert torch.equal(copy, x) and is_channels_last(copy)
    second = to_channels_second(x)
    assert torch.equal(second, x) and second.is_contiguous()


def test_copy_is_differentiable():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(to_channels_last, x)
    assert torch.autograd.gradgradcheck(to_channels_last, x)
    x = to_channels_last(x.detach()).requires_grad_()
    assert torch.autograd.gradcheck(to_channels_second, x)
    assert torch.autograd.gradgradcheck(to_channels_second, x)


@pytest.mark.skipif(not compiled.is_available(), reason=str(compiled.unavailable_reason()))
def test_copy_in_torch():
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    library.opcheck(torch.ops.ccnet_d2.to_channels_last.default, (x,))
    with pytest.raises(RuntimeError, match=r"x must be a CPU tensor \(B, C, \*S\)"):
        torch.ops.ccnet_d2.to_channels_last(x[0, 0])


def test_layouts():
    x = torch.zeros(2, 3, 4, 5)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert is_dense(x) and not is_channels_last(x)
    assert is_dense(last) and is_channels_last(last)
    assert not is_dense(x.transpose(2, 3)) and not is_dense(x[:, :, 1:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_even_in_some_channels_of_a_channels_last_map(shape):
    x = torch.zeros(shape[0], *shape[2:], shape[1] + 3).movedim(-1, 1)
    assert has_even_rows(x) and has_even_rows(x[:, 2:-1]) and has_even_rows(x[1:])


def test_rows_that_are_not_even():
    x = torch.zeros(2, 4, 5, 3).movedim(-1, 1)
    for other in (x[:, :, 1:, 1:], x[:, :, :, 1:], x.transpose(2, 3), x[:, ::2], x.contiguous()):
        assert not has_even_rows(other)
    for other in (x[:, :, 1:], x[..., :1], x.contiguous()[:, :1]):
        assert has_even_rows(other)


def asked_for_huge_pages(address):
    """Whether the mapping of this address carries the mark that madvise sets, by the kernel's own list."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("the address is in no mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="a system without huge pages"
)
@pytest.mark.skipif(not compiled.is_available(), reason=str(compiled.unavailable_reason()))
def test_large_new_tensors_are_on_huge_pages():
    for count, wanted in ((2**26, True), (2**18, False)):
        memory = mmap.mmap(-1, count)  # a mapping of its own: no earlier tensor's mark
        x = torch.frombuffer(memory, dtype=torch.bfloat16)
        middle = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + count // 2
        assert on_huge_pages(x) is x
        assert asked_for_huge_pages(middle) == wanted
