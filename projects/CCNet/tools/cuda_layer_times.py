"""Times of the layer's other kernels on a GPU: copies to channels-last memory and the gated residual.

As replays of CUDA graphs over several sets of inputs, between all layouts, beside the time in which the GPU copies as
many bytes.

Shapes: B batch, C channels, S spatial sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccnet_d2.ops.layout import to_channels_last
from cuda_op_cases import DTYPES
from cuda_op_times import INPUT_SETS, TIMED_CHANNELS, milliseconds_of

Step = Callable[[Tensor, Tensor, Tensor], object]
"""A step of a layer: of the attended map, gamma, and the other map, x or a gradient."""

LAYOUTS = {"NCHW": False, "channels-last": True}
STEP_HEAD = f"{'dtype':9} {'sizes':8} {'step':42} {'ms':>9} {'x floor':>8}"


def layer_steps() -> dict[str, tuple[bool, int, Step]]:
    """Each step's name, whether the other map is channels-last, how many maps it reads and writes, and the step."""
    kernels = torch.ops.ccnet_d2
    steps: dict[str, tuple[bool, int, Step]] = {
        "copy, NCHW to channels-last": (False, 2, lambda attended, gamma, x: kernels.to_channels_last(x))
    }
    for name, channels_last in LAYOUTS.items():
        for out_name, out_last in LAYOUTS.items():

            def add(attended: Tensor, gamma: Tensor, x: Tensor, out_last: bool = out_last) -> object:
                return kernels.gated_residual_forward(attended, gamma, x, out_last)

            steps[f"residual, {name} to {out_name}"] = (channels_last, 3, add)
        steps[f"its gradients, from {name}"] = (
            channels_last,
            3,
            lambda attended, gamma, x: kernels.gated_residual_backward(x, attended, gamma),
        )
    return steps


def time_layer_steps(
    dtype: str, sizes: tuple[int, ...], ceilings: dict[str, float], device: torch.device, repeats: int
) -> list[dict[str, object]]:
    """One row for each step."""
    channels = TIMED_CHANNELS[1]
    maps = [torch.randn(1, channels, *sizes, device=device).to(DTYPES[dtype]) for _ in range(2 * INPUT_SETS)]
    others = {False: maps[INPUT_SETS:], True: [to_channels_last(x) for x in maps[INPUT_SETS:]]}
    attended = [to_channels_last(x) for x in maps[:INPUT_SETS]]
    gamma = torch.full((1,), 0.5, device=device)
    rows: list[dict[str, object]] = []
    for name, (channels_last, moved, step) in layer_steps().items():
        pairs = zip(attended, others[channels_last], strict=True)
        calls = [lambda a=a, x=x: step(a, gamma, x) for a, x in pairs]  # noqa: B023 - called before the next step
        milliseconds = milliseconds_of(calls, repeats)
        floor = 1e3 * moved * attended[0].nbytes / ceilings["bytes"]
        rows.append(
            {
                "dtype": dtype,
                "sizes": "x".join(map(str, sizes)),
                "step": name,
                "milliseconds": milliseconds,
                "floor_milliseconds": floor,
                "times_floor": milliseconds / floor,
            }
        )
    return rows


def render_step(row: dict[str, object]) -> str:
    """A row of the table that `STEP_HEAD` heads."""
    return f"{row['dtype']:9} {row['sizes']:8} {row['step']:42} {row['milliseconds']:9.4f} {row['times_floor']:8.2f}"
