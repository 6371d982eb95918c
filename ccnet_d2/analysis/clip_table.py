"""What 3D criss-cross attention costs on clips, beside full attention over space and time."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ccnet_d2.layers import RCCA, NonLocal
from ccnet_d2.ops import available_backends

from .costs import MEMORY, PEAK, traced_cost
from .flops import CONVENTION
from .text import columns, notes

MAPS = ((1, 512, 5, 63, 63), (1, 512, 8, 97, 97))
"""(B, C, T, H, W) of the paper's clips, 5 frames of 504x504 at output stride 8, and of 8 frames of 769x769."""

_LOOPS = 3  # with which every position has seen the whole clip (TPAMI, Sec. 3.5)


def clip_table(
    maps: Sequence[Sequence[int]] = MAPS, *, measure_time: bool = True, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Cost of RCCA with R=3 and of one loop of full attention, on maps of clips.

    FLOPs and memory are traced, so that they are known where the memory is not there. Full attention with its map in
    memory is not timed; it cannot be run on the larger maps.

    Args:
        maps: shapes (B, C, T, H, W) with C divisible by 8.
        measure_time: whether to run the modules: the fused full attention on 8x97x97 takes a minute or two on a CPU.
        device: where to run them.

    Returns:
        What `--json` writes.
    """
    fastest = "compiled" if available_backends()["compiled"] is None else "matmul"
    rows = []
    for shape in maps:
        channels = shape[1]
        for method, module, backend, counted in (
            (f"RCCA (R={_LOOPS})", partial(RCCA, channels, _LOOPS, 3), fastest, "matmul"),
            ("full, fused", partial(NonLocal, channels, 1, 3), "sdpa", "sdpa"),
            ("full, map in memory", partial(NonLocal, channels, 1, 3), "matmul", "matmul"),
        ):
            cost = traced_cost(partial(module, backend=backend), shape)
            frames, height, width = shape[2:]
            is_full = module.func is NonLocal
            seconds = None
            if measure_time and not (is_full and backend == "matmul"):
                seconds = _seconds(
                    module(backend=backend), shape, torch.device(device), repeats=1 if is_full else 3
                )
            rows.append(
                {
                    "map": list(shape),
                    "method": method,
                    "keys": frames * height * width if is_full else frames + height + width - 2,
                    "gflops": traced_cost(partial(module, backend=counted), shape).gflops,
                    "memory_mb": cost.kept_mb,
                    "peak_mb": cost.peak_mb,
                    "seconds": seconds,
                    "backend": backend,
                }
            )
    threads = torch.get_num_threads()
    return {
        "table": "clips",
        "device": str(device) + (f", {threads} thread{'s' * (threads != 1)}" if str(device) == "cpu" else ""),
        "conventions": {
            "keys": "positions that one attends to in a loop",
            "gflops": f"10^9 FLOPs of the module alone: {CONVENTION}",
            "memory_mb": f"{MEMORY}; computed from the sizes of all tensors, not run",
            "peak_mb": f"{PEAK}; computed likewise",
            "seconds": "of a forward pass in fp32 without gradients; the map in memory is not run",
        },
        "rows": rows,
    }


@torch.no_grad()
def _seconds(module: nn.Module, shape: Sequence[int], device: torch.device, *, repeats: int) -> float:
    """The fastest of some forward passes, after one on a small map that is not counted."""
    module = module.to(device).eval()
    nn.init.constant_(module.get_parameter("gamma"), 1.0)
    module(torch.randn(1, shape[1], 2, 8, 8, device=device))
    x = torch.randn(tuple(shape), device=device)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        module(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def format_clip_table(table: dict[str, Any]) -> str:
    """`clip_table`'s result as text."""
    rows = [("map", "method", "keys", "GFLOPs", "memory (MB)", "peak (MB)", "seconds", "backend")]
    for row in table["rows"]:
        seconds = row["seconds"]
        rows.append(
            (
                "x".join(map(str, row["map"][2:])),
                row["method"],
                str(row["keys"]),
                f"{row['gflops']:.1f}",
                f"{row['memory_mb']:.0f}",
                f"{row['peak_mb']:.0f}",
                "" if seconds is None else f"{seconds:.2f}",
                row["backend"],
            )
        )
    channels = table["rows"][0]["map"][1]
    title = f"3D criss-cross attention beside full attention over a clip, C={channels}, {table['device']}"
    return "\n\n".join([title, columns(rows), notes(table["conventions"])])
