"""CCNet, TPAMI, Tab. 2 and 5: what RCCA and non-local attention cost, computed again."""

from functools import partial
from typing import Any

from ccnet_d2.layers import RCCA, NonLocal
from ccnet_d2.ops import available_backends

from .costs import MEMORY, PEAK, traced_cost
from .flops import CONVENTION
from .text import columns, notes, number

MAP = (1, 512, 97, 97)
"""The map that the paper measures on: an image of 769x769 at output stride 8."""

_PRINTED: dict[str, tuple[float, float]] = {
    "RCCA (R=1)": (8.3, 53),
    "RCCA (R=2)": (16.5, 127),
    "RCCA (R=3)": (24.7, 208),
    "NL": (108, 1411),
    "NL (R=2)": (216, 2820),
}
"""GFLOPs and MB by method."""


def ccnet_table() -> dict[str, Any]:
    """Measure what the paper prints, and non-local attention as this package computes it by default.

    Returns:
        What `--json` writes: `conventions`, and for each of the `rows` the paper's figures (None where it prints none)
        beside those measured.
    """
    fastest = "compiled" if available_backends()["compiled"] is None else "matmul"
    methods = [
        # (method, module, backend of the memory, backend of the FLOPs: that which computes nothing twice)
        *((f"RCCA (R={r})", partial(RCCA, 512, r), fastest, "matmul") for r in (1, 2, 3)),
        ("NL", partial(NonLocal, 512, 1), "matmul", "matmul"),
        ("NL (R=2)", partial(NonLocal, 512, 2), "matmul", "matmul"),
        ("NL, fused", partial(NonLocal, 512, 1), "sdpa", "sdpa"),
        ("NL (R=2), fused", partial(NonLocal, 512, 2), "sdpa", "sdpa"),
    ]
    rows = []
    for method, module, backend, counted in methods:
        cost = traced_cost(partial(module, backend=backend), MAP)
        gflops = traced_cost(partial(module, backend=counted), MAP).gflops
        paper_gflops, paper_memory = _PRINTED.get(method, (None, None))
        rows.append(
            {
                "method": method,
                "paper_gflops": paper_gflops,
                "gflops": gflops,
                "difference_percent": None if paper_gflops is None else 100 * (gflops / paper_gflops - 1),
                "paper_memory_mb": paper_memory,
                "memory_mb": cost.kept_mb,
                "peak_mb": cost.peak_mb,
                "backend": backend,
            }
        )
    return {
        "table": "ccnet",
        "source": "CCNet (TPAMI), Tab. 2 and 5",
        "input": list(MAP),
        "conventions": {
            "gflops": f"10^9 FLOPs of the module alone: {CONVENTION}",
            "memory_mb": MEMORY,
            "peak_mb": PEAK,
            "backend": "of the memory; 'matmul' of NL keeps the attention map as the published module does, 'sdpa' is "
            "the default here and computes the energies again for every 64 value channels",
        },
        "rows": rows,
    }


def format_ccnet_table(table: dict[str, Any]) -> str:
    """`ccnet_table`'s result as text."""
    rows = [
        ("", "GFLOPs", "", "", "memory (MB)", "", "", ""),
        ("method", "paper", "here", "diff", "paper", "here", "peak", "backend"),
    ]
    for row in table["rows"]:
        difference = row["difference_percent"]
        rows.append(
            (
                row["method"],
                number(row["paper_gflops"]),
                f"{row['gflops']:.2f}",
                "" if difference is None else f"{difference:+.1f}%",
                number(row["paper_memory_mb"]),
                f"{row['memory_mb']:.1f}",
                f"{row['peak_mb']:.1f}",
                row["backend"],
            )
        )
    title = f"{table['source']}, on a map of {'x'.join(map(str, table['input']))}"
    return "\n\n".join([title, columns(rows), notes(table["conventions"])])
