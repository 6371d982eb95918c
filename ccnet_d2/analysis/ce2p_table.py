"""Human parsing: what CE2P costs with its own context module, PSP, and with RCCA in its place."""

from typing import Any

from ccnet_d2.engine import load_run

from .flops import CONVENTION
from .run import analyze_run
from .text import columns, notes

RUN = "lip/ce2p_R_101_D16_473x473_115k.py"
SIZE = (473, 473)
CONTEXTS = {"PSP": "psp", "RCCA (R=2)": "rcca"}


def ce2p_table() -> dict[str, Any]:
    """Trace the run's model with each context module, on one image of its crop size.

    Returns:
        What `--json` writes: `conventions`, and for each of the `rows`, a part of the model or the whole, parameters
        (in 10^6) and GFLOPs by context module.
    """
    costs = {
        name: analyze_run(load_run(RUN, [f"model.sem_seg_head.context={context}"]), SIZE, time=False)
        for name, context in CONTEXTS.items()
    }
    parts = next(iter(costs.values()))["modules"]
    rows: list[dict[str, Any]] = [
        {
            "part": part,
            "costs": {
                name: {
                    "parameters_m": cost["modules"][part]["parameters"] / 1e6,
                    "gflops": cost["modules"][part]["gflops"],
                }
                for name, cost in costs.items()
            },
        }
        for part in parts
    ]
    return {
        "table": "ce2p",
        "source": f"{RUN}, with either context module",
        "input": [1, 3, *SIZE],
        "inference_peak_mb": {name: cost["inference_peak_mb"] for name, cost in costs.items()},
        "conventions": {
            "sem_seg_head.context": "PSP on res5; or the two 3x3 convolutions, RCCA and the fusion that take its place",
            "gflops": f"10^9 FLOPs of inference on one image: {CONVENTION}",
        },
        "rows": rows,
    }


def format_ce2p_table(table: dict[str, Any]) -> str:
    """`ce2p_table`'s result as text."""
    names = list(CONTEXTS)
    rows = [
        ("", *(cell for name in names for cell in (name, ""))),
        ("", *("parameters (M)", "GFLOPs") * len(names)),
    ]
    for row in table["rows"]:
        figures = (row["costs"][name] for name in names)
        rows.append((row["part"], *(f"{f[key]:.2f}" for f in figures for key in ("parameters_m", "gflops"))))
    title = f"{table['source']}: {' x '.join(map(str, table['input']))}"
    peaks = ", ".join(f"{name} {table['inference_peak_mb'][name]:.0f}" for name in names)
    memory = f"memory of inference (MB): {peaks}"
    return "\n\n".join([title, columns(rows), memory, notes(table["conventions"])])
