"""Times of criss-cross attention on a GPU, as replays of CUDA graphs over several sets of inputs.

The kernels and the other formulations, beside the floor that follows from the bandwidth and the matrix rate measured
in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attention_formulations import operator_elements, operator_flops, textbook_attention
from ccnet_d2.ops import compiled, matmul
from cuda_op_cases import DTYPES, Case, make_inputs
from gpu_timing import Recording, median_seconds
from official_kernels import OfficialKernels

TIMED_SIZES = ((64, 64), (97, 97), (128, 256))
TIMED_CHANNELS = (64, 512)  # C', C
INPUT_SETS = 6  # together larger than the cache at 97 x 97
# Which of the forward and the backward pass's counts they take.
PASSES = {"forward": slice(0, 1), "forward+backward": slice(0, 2), "backward": slice(1, 2)}
OFFICIAL = "official fp32"

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...] = tuple(DTYPES)) -> dict[str, float]:
    """Copied bytes per second (read plus written) and floating-point operations per second of large matrix products."""
    source = torch.randint(-128, 127, (1 << 31,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ceilings = {"bytes": 2 * source.numel() / median_seconds(lambda: target.copy_(source), 10)}
    for name in dtypes:
        n = 8192
        a, b = (torch.randn((n, n), device=device, dtype=DTYPES[name]) for _ in range(2))
        ceilings[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, 10)
    return ceilings


def milliseconds_of(calls: Sequence[Callable[[], object]], repeats: int, most_seconds: float = 10.0) -> float:
    """Median time of one of the calls, as replays of one CUDA graph of them all."""
    return 1e3 * median_seconds(Recording(calls).replay, repeats, most_seconds) / len(calls)


def graph_milliseconds(
    function: Attention, sets: list[Inputs], repeats: int, *, backward: bool, most_seconds: float = 10.0
) -> float:
    """Median time of a formulation's forward pass, or with `backward` of both, over all sets of inputs."""

    def call(inputs: Inputs) -> object:
        query, key, value, grad_out = inputs
        if not backward:
            with torch.no_grad():
                return function(query, key, value)
        leaves = tuple(x.detach().requires_grad_() for x in (query, key, value))
        return torch.autograd.grad(function(*leaves), leaves, grad_out)

    return milliseconds_of([lambda inputs=inputs: call(inputs) for inputs in sets], repeats, most_seconds)


def backward_milliseconds(sets: list[Inputs], repeats: int) -> float:
    """The same of the kernels' backward pass alone, what it needs of the forward pass being there."""
    kernels = torch.ops.ccnet_d2
    arguments = []
    with torch.no_grad():
        for query, key, value, grad_out in sets:
            results = kernels.criss_cross_forward(query, key, value)
            arguments.append((grad_out, query, key, value, *results))
        return milliseconds_of([lambda x=x: kernels.criss_cross_backward(*x) for x in arguments], repeats)


def times_faster(other: float | None, milliseconds: float) -> float | None:
    """Than another formulation, where that was timed."""
    return None if other is None else other / milliseconds


def time_sizes(
    dtype: str,
    sizes: tuple[int, ...],
    ceilings: dict[str, float],
    device: torch.device,
    repeats: int,
    official: OfficialKernels | None = None,
) -> list[dict[str, object]]:
    """One row for each pass and formulation, with its time over the floor's and that of the others over it.

    The last is of the kernels' backward pass alone. The official kernels compute in fp32 whatever the dtype of the
    others; conversions are not counted.
    """
    key_channels, channels = TIMED_CHANNELS

    def input_sets(layout: str, dtype: str = dtype, count: int = INPUT_SETS) -> list[Inputs]:
        return [
            make_inputs(Case(dtype, 1, sizes, key_channels, channels, layout, 1.0, seed=i), device)
            for i in range(count)
        ]

    # Each formulation gets the layout that it is made for.
    channels_last, contiguous = input_sets("channels_last"), input_sets("contiguous")
    formulations: dict[str, tuple[Attention, list[Inputs]]] = {
        "compiled": (compiled.criss_cross_attention, channels_last),
        "matmul": (matmul.criss_cross_attention, channels_last),
        "textbook": (textbook_attention, contiguous),
    }
    if official is not None:
        formulations[OFFICIAL] = (official.attention, input_sets("contiguous", "float32", 2))
    flops = operator_flops(1, key_channels, channels, sizes)
    elements = operator_elements(1, key_channels, channels, sizes)
    itemsize = DTYPES[dtype].itemsize
    rows = []
    for pass_name, counted in PASSES.items():
        flop_count, element_count = sum(flops[counted]), sum(elements[counted])
        floor = 1e3 * max(flop_count / ceilings[dtype], element_count * itemsize / ceilings["bytes"])
        if pass_name == "backward":
            times = {"compiled": backward_milliseconds(channels_last, repeats)}
        else:
            times = {
                name: graph_milliseconds(function, sets, repeats, backward=pass_name != "forward")
                for name, (function, sets) in formulations.items()
            }
        for name, milliseconds in times.items():
            rows.append(
                {
                    "dtype": dtype,
                    "sizes": "x".join(map(str, sizes)),
                    "pass": pass_name,
                    "formulation": name,
                    "milliseconds": milliseconds,
                    "floor_milliseconds": floor,
                    "times_floor": milliseconds / floor,
                    "times_faster_than_textbook": times_faster(times.get("textbook"), milliseconds),
                    "times_faster_than_official": times_faster(times.get(OFFICIAL), milliseconds),
                }
            )
    return rows


def render_row(row: dict[str, object]) -> str:
    """A row of the table that `TABLE_HEAD` heads."""
    textbook, official = row["times_faster_than_textbook"], row["times_faster_than_official"]
    return (
        f"{row['dtype']:9} {row['sizes']:8} {row['pass']:17} {row['formulation']:14} {row['milliseconds']:9.4f} "
        f"{row['times_floor']:8.2f} "
        + ("" if textbook is None else f"{textbook:11.2f} ")
        + ("" if official is None else f"{official:11.1f}")
    ).rstrip()


TABLE_HEAD = (
    f"{'dtype':9} {'sizes':8} {'pass':17} {'formulation':14} {'ms':>9} {'x floor':>8} {'x textbook':>11} "
    f"{'x official':>11}"
)
