"""The papers' tables of what context modules cost (CCNet, TPAMI, Tab. 2 and 5; RANet, Tab. 3), computed again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ccnet_d2.layers import RCCA, NonLocal, build_context
from ccnet_d2.layers.norm_act import ConvNormAct
from ccnet_d2.ops import available_backends

from .costs import Cost, traced_cost
from .flops import CONVENTION

MAP = (1, 512, 97, 97)
"""The map that both papers measure on: an image of 769x769 at output stride 8."""

_BACKBONE_CHANNELS = 2048
_MEMORY = (
    "10^6 bytes that a forward pass leaves for the backward pass, in fp32, without parameters and the module's own "
    "input and output; every allocation followed, workspaces within kernels not included"
)
_PEAK = (
    "10^6 bytes of new tensors that live at once at most in a forward and a backward pass, gradients included"
)
_MATCH = 0.05


@dataclass(frozen=True)
class Figures:
    """What a paper prints; None where it prints nothing."""

    gflops: float | None = None
    memory_mb: float | None = None
    parameters_m: float | None = None


def ccnet_table() -> dict[str, Any]:
    """CCNet, Tab. 2 and 5: RCCA against non-local attention.

    Returns:
        What `--json` writes: `conventions`, and for each of the `rows` the paper's figures beside the measured ones.
    """
    automatic = "compiled" if available_backends()["compiled"] is None else "matmul"
    rcca = [(f"RCCA (R={r})", partial(RCCA, 512, r), automatic) for r in (1, 2, 3)]
    non_local = [
        (f"NL{f' (R={r})' if r > 1 else ''}{note}", partial(NonLocal, 512, r), backend)
        for note, backend in (("", "matmul"), (", fused", "sdpa"))
        for r in (1, 2)
    ]
    printed = {
        "RCCA (R=1)": Figures(8.3, 53),
        "RCCA (R=2)": Figures(16.5, 127),
        "RCCA (R=3)": Figures(24.7, 208),
        "NL": Figures(108, 1411),
        "NL (R=2)": Figures(216, 2820),
    }
    rows = []
    for method, build, backend in (*rcca, *non_local):
        # FLOPs of the definition: each energy and each product with a value once.
        counted = "matmul" if method.startswith("RCCA") else backend
        flops = traced_cost(partial(build, backend=counted), MAP)
        cost = flops if backend == counted else traced_cost(partial(build, backend=backend), MAP)
        paper = printed.get(method, Figures())
        rows.append(
            {
                "method": method,
                "paper_gflops": paper.gflops,
                "gflops": flops.gflops,
                "difference_percent": _difference(flops.gflops, paper.gflops),
                "paper_memory_mb": paper.memory_mb,
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
            "memory_mb": _MEMORY,
            "peak_mb": _PEAK,
            "backend": "of the measured memory; 'fused' rows are the default here and compute the energies again for "
            "every 64 value channels, the others keep the attention map as the published modules do",
        },
        "rows": rows,
    }


def format_ccnet_table(table: dict[str, Any]) -> str:
    """The table as text."""
    head = ("", "GFLOPs", "", "", "memory (MB)", "", "", "")
    names = ("method", "paper", "here", "diff", "paper", "here", "peak", "backend")
    lines = [head, names]
    for row in table["rows"]:
        lines.append(
            (
                row["method"],
                _number(row["paper_gflops"]),
                f"{row['gflops']:.2f}",
                "" if row["difference_percent"] is None else f"{row['difference_percent']:+.1f}%",
                _number(row["paper_memory_mb"]),
                f"{row['memory_mb']:.1f}",
                f"{row['peak_mb']:.1f}",
                row["backend"],
            )
        )
    return _with_conventions(table, lines)


class _Reduced(nn.Module):
    """A 3x3 convolution to 512 channels, then the module."""

    def __init__(self, context: nn.Module) -> None:
        super().__init__()
        self.reduce = ConvNormAct(_BACKBONE_CHANNELS, MAP[1], 3)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.context(self.reduce(x))
        return out


class _Head(nn.Module):
    """The CCNet head up to its classifier, with the module in RCCA's place."""

    def __init__(self, context: nn.Module) -> None:
        super().__init__()
        self.inner = _Reduced(context)
        self.convb = ConvNormAct(MAP[1], MAP[1], 3)
        self.fuse = ConvNormAct(_BACKBONE_CHANNELS + MAP[1], MAP[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fuse(torch.cat([x, self.convb(self.inner(x))], dim=1))
        return out


_SCOPES = {
    "module alone": "on the map of 1x512x97x97 that the caption names",
    "with reduction": "the 3x3 convolution from the backbone's 2048 channels to 512, then the module",
    "whole head": "everything from the backbone's 2048 channels up to the classifier",
}


def ranet_table() -> dict[str, Any]:
    """RANet, Tab. 3. Its printed figures fit no single convention, so each is compared with several.

    Returns:
        What `--json` writes: `conventions`, and for each of the `rows` the `paper`'s figures, the `costs` by what is
        measured (a key of `conventions`), and for each figure the nearest of them under `nearest`.
    """
    printed = {
        "Asymmetric NL": ("asymmetric_nl", Figures(163, 634, 13)),
        "CCNet": ("rcca", Figures(198, 730, 18)),
        "DANet": ("danet", Figures(264, 2611, 23)),
        "PSANet": ("psanet", Figures(372, 3124, 50)),
    }
    rows = []
    for method, (name, paper) in printed.items():
        costs = {
            scope: traced_cost(build, (1, channels, *MAP[2:])) for scope, build, channels in _scopes(name)
        }
        rows.append(
            {
                "method": method,
                "paper": {
                    "gflops": paper.gflops,
                    "parameters_m": paper.parameters_m,
                    "memory_mb": paper.memory_mb,
                },
                "costs": {
                    scope: {
                        "gmacs": cost.gmacs,
                        "gflops": cost.gflops,
                        "parameters_m": cost.parameters / 1e6,
                        "memory_mb": cost.kept_mb,
                        "peak_mb": cost.peak_mb,
                    }
                    for scope, cost in costs.items()
                },
                "nearest": _nearest(costs, paper),
            }
        )
    return {
        "table": "ranet",
        "source": "RANet (NeurIPS 2020), Tab. 3",
        "input": list(MAP),
        "conventions": {
            **_SCOPES,
            "gflops": f"10^9 FLOPs: {CONVENTION}; gmacs are half of them",
            "memory_mb": _MEMORY,
            "peak_mb": _PEAK,
            "nearest": f"a printed figure counts as met within {_MATCH:.0%}",
        },
        "rows": rows,
    }


def format_ranet_table(table: dict[str, Any]) -> str:
    """The table as text."""
    lines: list[tuple[str, ...]] = [("method", "GMACs", "GFLOPs", "params (M)", "memory (MB)", "peak (MB)")]
    for row in table["rows"]:
        paper = row["paper"]
        lines.append(
            (
                f"{row['method']}, paper",
                "",
                _number(paper["gflops"]),
                _number(paper["parameters_m"]),
                _number(paper["memory_mb"]),
                "",
            )
        )
        for scope, cost in row["costs"].items():
            numbers = (cost[key] for key in ("gmacs", "gflops", "parameters_m", "memory_mb", "peak_mb"))
            lines.append((f"  {scope}", *(f"{number:.1f}" for number in numbers)))
    verdicts = []
    for row in table["rows"]:
        for figure, nearest in row["nearest"].items():
            verdict = "matches" if nearest["met"] else "matches no convention; nearest:"
            verdicts.append(
                f"{row['method']}: printed {figure} {_number(nearest['paper'])} {verdict} {nearest['what']}, "
                f"{nearest['value']:.1f} ({nearest['difference_percent']:+.1f}%)."
            )
    return _with_conventions(table, lines) + "\n\n" + "\n".join(verdicts)


def _scopes(name: str) -> list[tuple[str, Callable[[], nn.Module], int]]:
    """(scope, how to build it, input channels) of a context module."""
    # The published DANet holds the attention map.
    options = {"backend": "matmul"} if name == "danet" else {}

    def context(in_channels: int) -> nn.Module:
        return build_context(name, in_channels, MAP[1], **options)

    scopes: list[tuple[str, Callable[[], nn.Module], int]] = [
        ("module alone", lambda: context(MAP[1]), MAP[1])
    ]
    if getattr(context(MAP[1]), "standalone", False):
        scopes.append(("whole head", lambda: context(_BACKBONE_CHANNELS), _BACKBONE_CHANNELS))
    else:
        scopes.append(("with reduction", lambda: _Reduced(context(MAP[1])), _BACKBONE_CHANNELS))
        scopes.append(("whole head", lambda: _Head(context(MAP[1])), _BACKBONE_CHANNELS))
    return scopes


def _nearest(costs: dict[str, Cost], paper: Figures) -> dict[str, dict[str, Any]]:
    """For each printed figure the convention that comes nearest to it."""
    candidates: dict[str, tuple[float | None, dict[str, float]]] = {
        "FLOPs (G)": (
            paper.gflops,
            {
                f"{unit}, {scope}": getattr(cost, unit.lower())
                for scope, cost in costs.items()
                for unit in ("GMACs", "GFLOPs")
            },
        ),
        "parameters (M)": (
            paper.parameters_m,
            {f"parameters, {scope}": cost.parameters / 1e6 for scope, cost in costs.items()},
        ),
        "memory (MB)": (
            paper.memory_mb,
            {f"memory, {scope}": cost.kept_mb for scope, cost in costs.items()}
            | {f"peak, {scope}": cost.peak_mb for scope, cost in costs.items()},
        ),
    }
    nearest = {}
    for figure, (value, options) in candidates.items():
        if value is None:
            continue
        what = min(options, key=lambda option: abs(options[option] / value - 1))
        difference = options[what] / value - 1
        nearest[figure] = {
            "paper": value,
            "what": what,
            "value": options[what],
            "difference_percent": 100 * difference,
            "met": abs(difference) <= _MATCH,
        }
    return nearest


def _difference(value: float, paper: float | None) -> float | None:
    return None if paper is None else 100 * (value / paper - 1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _with_conventions(table: dict[str, Any], lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
    size = "x".join(str(side) for side in table["input"])
    notes = [f"{name}: {text}." for name, text in table["conventions"].items()]
    return "\n".join([f"{table['source']}, on a map of {size}", "", *rows, "", *notes])
