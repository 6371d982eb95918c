"""The calls by which check_cuda_op.py checks the kernels of criss-cross attention, and their inputs.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


@dataclass(frozen=True)
class Case:
    """One call."""

    dtype: str
    batch: int
    sizes: tuple[int, ...]
    key_channels: int
    channels: int
    layout: str
    logit_scale: float
    seed: int


# B, S, C', C, layout, scale of the logits
Shape = tuple[int, tuple[int, ...], int, int, str, float]

# Every path of the kernels at the sizes of real use.
FIXED_SHAPES: tuple[Shape, ...] = (
    (1, (1, 1), 1, 1, "contiguous", 1.0),
    (2, (1, 9), 8, 16, "channels_last", 1.0),
    (2, (9, 1), 3, 5, "contiguous", 1.0),
    (1, (97, 97), 64, 512, "channels_last", 1.0),
    (1, (128, 256), 64, 512, "channels_last", 1.0),
    (1, (5, 63, 63), 64, 512, "channels_last", 1.0),
    (2, (129, 3), 24, 72, "channels_last", 1.0),
    (1, (5000,), 16, 40, "contiguous", 1.0),
    (1, (3, 1300), 72, 264, "channels_last", 2.0),
    (1, (20, 30), 64, 2048, "channels_last", 1.0),
    (1, (20, 30), 700, 33, "sliced", 1.0),
    (1, (33, 40), 64, 128, "channels_last", 1e5),
    (70000, (1, 2), 8, 8, "channels_last", 1.0),
)

# Every kernel and every path of it at the smallest sizes that reach it. Dense channels-last halves with channels in
# eights go to the kernels for compute capability 9.0, the others to the general ones.
SMALL_SHAPES: tuple[Shape, ...] = (
    # Lines of one tile, several panels, the last of each unfilled.
    (1, (2, 97), 72, 136, "channels_last", 1.0),
    (2, (3, 5), 8, 16, "channels_last", 1.0),  # several lines in a tile
    (1, (2, 130), 8, 72, "channels_last", 1.0),  # lines of two tiles
    (1, (2, 2, 40), 16, 32, "channels_last", 30.0),  # three axes; one key takes nearly all
    (1, (1, 9), 8, 16, "channels_last", 1.0),  # no key but the own position on the first axis
    (1, (7, 1), 8, 8, "channels_last", 1.0),
    (1, (1, 33), 136, 520, "channels_last", 1.0),  # panels enough to go around the ring
    # Several launches for a line; backward by the general kernels.
    (1, (300, 1), 8, 24, "channels_last", 1.0),
    (2, (3, 33), 72, 72, "expanded", 1.0),  # general kernels, vectors
    (2, (1, 530), 8, 16, "expanded", 1.0),  # general kernels, several launches and pairs of blocks for a line
    (1, (2, 5), 5, 19, "sliced", 1.0),  # general kernels, element by element
    (1, (2, 2, 3), 3, 10, "channels_last", 1.0),
    (1, (4, 5), 8, 16, "contiguous", 1.0),  # copied to channels-last first
    # More lines than a GPU has multiprocessors, up to 133: a CTA takes several, of one tile and of two, on the first
    # axis and on the last.
    (1, (70, 134), 8, 136, "channels_last", 1.0),
    (1, (134, 70), 8, 8, "channels_last", 1.0),
    (1, (134, 130), 8, 8, "channels_last", 1.0),
    (2, (50, 130), 8, 8, "expanded", 1.0),  # general kernels: a CTA takes all pairs of blocks of a line
)


def draw_cases(count: int, seed: int, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Case]:
    """`FIXED_SHAPES`, then drawn ones, `count` in all for the dtypes together; at least the fixed ones, if any."""
    if count == 0:
        return []
    draw = random.Random(seed)
    shapes = list(FIXED_SHAPES)
    per_dtype = max(len(shapes), -(-count // len(dtypes)))
    while len(shapes) < per_dtype:
        axes = draw.randint(1, 3)
        most = {1: 70, 2: 70, 3: 12}[axes]
        sizes = tuple(1 if draw.random() < 0.1 else draw.randint(1, most) for _ in range(axes))
        key_channels = 8 * draw.randint(1, 16) if draw.random() < 0.5 else draw.randint(1, 80)
        channels = 8 * draw.randint(1, 64) if draw.random() < 0.5 else draw.randint(1, 300)
        scale = draw.choice((0.1, 1.0, 1.0, 3.0, 20.0))
        shapes.append((draw.randint(1, 3), sizes, key_channels, channels, draw.choice(LAYOUTS), scale))
    return [Case(dtype, *shape, seed=seed + i) for dtype in dtypes for i, shape in enumerate(shapes)]


def small_cases(seed: int, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Case]:
    """`SMALL_SHAPES` in each dtype, all dtypes of a shape in turn."""
    return [Case(dtype, *shape, seed=seed + i) for i, shape in enumerate(SMALL_SHAPES) for dtype in dtypes]


def make_inputs(
    case: Case, device: torch.device, drawn_on: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and grad_out of the case, laid out as it says.

    Args:
        case: the call.
        device: where they are to be.
        drawn_on: where the numbers are drawn, `device` by default. From the CPU they are copied as they lie, and no
            kernel runs for it.
    """
    drawn_on = drawn_on or device
    generator = torch.Generator(drawn_on).manual_seed(case.seed)
    scale = (case.logit_scale / case.key_channels**0.5) ** 0.5
    dtype = DTYPES[case.dtype]

    def normal(shape: tuple[int, ...], factor: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=drawn_on) * factor).to(dtype).to(device)

    tensors = []
    for channels, factor in ((case.key_channels, scale),) * 2 + ((case.channels, 1.0),) * 2:
        shape = (case.batch, channels, *case.sizes)
        if case.layout == "expanded":
            tensors.append(normal((1, *case.sizes, channels), factor).movedim(-1, 1).expand(shape))
        elif case.layout == "sliced":  # neither the address nor the strides are multiples of 16 bytes
            wide = normal((case.batch, *case.sizes, channels + 3), factor)
            tensors.append(wide[..., 1 : channels + 1].movedim(-1, 1))
        elif case.layout == "channels_last":
            tensors.append(normal((case.batch, *case.sizes, channels), factor).movedim(-1, 1))
        else:
            tensors.append(normal(shape, factor))
    query, key, value, grad_out = tensors
    return query, key, value, grad_out
