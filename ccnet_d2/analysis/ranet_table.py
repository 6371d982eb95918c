"""RANet, NeurIPS 2020, Tab. 3: what attention modules add to a network, computed again.

The printed figures fit no single convention, so each is compared with several.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ccnet_d2.layers import build_context
from ccnet_d2.modeling import CCNetHead

from .costs import MEMORY, PEAK, Cost, traced_cost
from .flops import CONVENTION
from .text import columns, notes, number

MAP = (1, 512, 97, 97)
"""The map that the paper's caption names."""

_PRINTED = {
    # method: context module, GFLOPs, parameters (M), memory (MB)
    "Asymmetric NL": ("asymmetric_nl", 163, 13, 634),
    "CCNet": ("rcca", 198, 18, 730),
    "DANet": ("danet", 264, 23, 2611),
    "PSANet": ("psanet", 372, 50, 3124),
}
_FIGURES = ("gflops", "parameters_m", "memory_mb")

_SCOPES = {
    "module alone": "on the map of 1x512x97x97 that the caption names",
    "with reduction": "the 3x3 convolution from the backbone's 2048 channels to 512, then the module",
    "whole head": "from the backbone's 2048 channels to the logits of 19 classes, without the auxiliary head",
}
_BACKBONE_CHANNELS = 2048
_MATCH = 0.05


def ranet_table() -> dict[str, Any]:
    """Measure the modules of the paper's table.

    Returns:
        What `--json` writes: `conventions`, and for each of the `rows` the `paper`'s figures, the `costs` by scope (a
        key of `conventions`), and for each printed figure the measured one that comes `nearest`.
    """
    rows = []
    for method, (name, *figures) in _PRINTED.items():
        costs = {scope: traced_cost(build, shape) for scope, build, shape in _scopes(name)}
        paper = dict(zip(_FIGURES, figures, strict=True))
        nearest = {figure: _nearest(paper[figure], _candidates(figure, costs)) for figure in _FIGURES}
        rows.append(
            {
                "method": method,
                "paper": paper,
                "costs": {scope: _as_dict(cost) for scope, cost in costs.items()},
                "nearest": nearest,
            }
        )
    return {
        "table": "ranet",
        "source": "RANet (NeurIPS 2020), Tab. 3",
        "input": list(MAP),
        "conventions": {
            **_SCOPES,
            "gflops": f"10^9 FLOPs: {CONVENTION}; gmacs are half of them",
            "memory_mb": MEMORY,
            "peak_mb": PEAK,
            "nearest": f"a printed figure is matched by what differs from it by at most {_MATCH:.0%}",
        },
        "rows": rows,
    }


def format_ranet_table(table: dict[str, Any]) -> str:
    """`ranet_table`'s result as text."""
    rows = [("method", "GMACs", "GFLOPs", "params (M)", "memory (MB)", "peak (MB)")]
    verdicts = []
    for row in table["rows"]:
        rows.append((f"{row['method']}, paper", "", *(number(row["paper"][f]) for f in _FIGURES), ""))
        for scope, cost in row["costs"].items():
            columns_of_scope = ("gmacs", *_FIGURES, "peak_mb")
            rows.append((f"  {scope}", *(f"{cost[column]:.1f}" for column in columns_of_scope)))
        for figure, nearest in row["nearest"].items():
            verdict = "matches" if nearest["met"] else "matches nothing measured; nearest:"
            verdicts.append(
                f"{row['method']}: {figure} {number(row['paper'][figure])} {verdict} {nearest['what']} "
                f"{nearest['value']:.1f} ({nearest['difference_percent']:+.1f}%)."
            )
    title = f"{table['source']}, on a map of {'x'.join(map(str, table['input']))}"
    return "\n\n".join([title, columns(rows), "\n".join(verdicts), notes(table["conventions"])])


class _Reduced(nn.Module):
    """The part of the CCNet head up to its context module."""

    def __init__(self, head: CCNetHead) -> None:
        super().__init__()
        self.conva, self.context = head.conva, head.context

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.context(self.conva(x))
        return out


class _Logits(nn.Module):
    def __init__(self, head: CCNetHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head.predict(x)


def _scopes(name: str) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """(scope, how to build it, shape of its input) of a context module."""
    # The published DANet holds the attention map.
    options = {"backend": "matmul"} if name == "danet" else {}

    def head() -> CCNetHead:
        context = partial(build_context, name, channels=MAP[1], activation="relu", **options)
        is_head = getattr(context(MAP[1]), "standalone", False)
        return CCNetHead(
            {"res5": ShapeSpec(channels=_BACKBONE_CHANNELS, stride=8)},
            num_classes=19,
            channels=MAP[1],
            context=context(_BACKBONE_CHANNELS if is_head else MAP[1]),
            norm="BN",
            aux_feature=None,
        )

    backbone_map = (1, _BACKBONE_CHANNELS, *MAP[2:])
    yield "module alone", partial(build_context, name, MAP[1], MAP[1], **options), MAP
    if not head().standalone:
        yield "with reduction", lambda: _Reduced(head()), backbone_map
    yield "whole head", lambda: _Logits(head()), backbone_map


def _as_dict(cost: Cost) -> dict[str, float]:
    return {
        "gmacs": cost.gmacs,
        "gflops": cost.gflops,
        "parameters_m": cost.parameters / 1e6,
        "memory_mb": cost.kept_mb,
        "peak_mb": cost.peak_mb,
    }


def _candidates(figure: str, costs: dict[str, Cost]) -> dict[str, float]:
    """What a printed figure might mean."""
    meanings = {"gflops": ("gflops", "gmacs"), "memory_mb": ("memory_mb", "peak_mb")}.get(figure, (figure,))
    return {
        f"{meaning} of '{scope}'": _as_dict(cost)[meaning]
        for scope, cost in costs.items()
        for meaning in meanings
    }


def _nearest(paper: float, candidates: dict[str, float]) -> dict[str, Any]:
    what = min(candidates, key=lambda candidate: abs(candidates[candidate] / paper - 1))
    difference = candidates[what] / paper - 1
    return {
        "what": what,
        "value": candidates[what],
        "difference_percent": 100 * difference,
        "met": abs(difference) <= _MATCH,
    }
