"""RANet, NeurIPS 2020, Tab. 3: what attention modules add to a network, computed again.

The printed figures fit no single convention, so each is compared with several.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ccnet_d2.layers import RegionConstruction, build_context
from ccnet_d2.modeling import CCNetHead, RANetHead

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
    "RANet": ("paper", 212, 21, 1893),
    "RANet (released)": ("code", 212, 21, 1893),
}
_RANET = ("RANet", "RANet (released)")
_FIGURES = ("gflops", "parameters_m", "memory_mb")

_SCOPES = {
    "module alone": "on the map of 1x512x97x97 that the caption names",
    "with reduction": "the 3x3 convolution from the backbone's 2048 channels to 512, then the module",
    "whole head": "from the backbone's 2048 channels to the logits of 19 classes, without the auxiliary head",
}
_BACKBONE_CHANNELS = 2048
_MATCH = 0.05
_REGIONS_A_SIDE = 5

_REGIONS = (
    f"RANet's cost depends on the regions: measured with {_REGIONS_A_SIDE**2} of equal size, some 400 pixels each as "
    "Sec. 5.2 says, 8 representatives each, pairs on a grid of 49x49; computed, not traced"
)

_TRAINING_STEP = (
    "peak memory of a whole training step of 769x769: analyze_model.py --config-file "
    "cityscapes/ranet_R_101_D8_769x769_40k.py --training-step (model.backbone.norm=BN on a CPU)"
)


def ranet_table(methods: Sequence[str] | None = None, shape: Sequence[int] = MAP) -> dict[str, Any]:
    """Measure the modules of the paper's table.

    Args:
        methods: some of its rows; None for all. Those of RANet take most of a minute.
        shape: another map than the paper's.

    Returns:
        What `--json` writes: `conventions`, and for each of the `rows` the `paper`'s figures, the `costs` by scope (a
        key of `conventions`), and for each printed figure the measured one that comes `nearest`.
    """
    rows = []
    for method, (name, *figures) in _PRINTED.items():
        if methods is not None and method not in methods:
            continue
        if method in _RANET:
            scopes, real = _ranet_scopes(name, tuple(shape)), True
        else:
            scopes, real = _scopes(name, tuple(shape)), False
        costs = {scope: traced_cost(build, size, real=real) for scope, build, size in scopes}
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
        "input": list(shape),
        "conventions": {
            **_SCOPES,
            "gflops": f"10^9 FLOPs: {CONVENTION}; gmacs are half of them",
            "memory_mb": MEMORY,
            "peak_mb": PEAK,
            "regions": _REGIONS,
            "training step": _TRAINING_STEP,
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


class _EqualRegions(RegionConstruction):
    """Finds regions and then takes equal ones instead, in as many rows as columns."""

    def partition(self, attention: Tensor) -> Tensor:
        found = super().partition(attention)
        side = round(found.shape[-1] ** 0.5)
        block = torch.arange(side) * _REGIONS_A_SIDE // side
        return (block[:, None] * _REGIONS_A_SIDE + block).flatten().expand_as(found)


class _RegionContext(nn.Module):
    """The part of the RANet head between reduction and fusion; the reduction too if asked for."""

    def __init__(self, head: RANetHead, with_reduction: bool) -> None:
        super().__init__()
        # The released code takes its coarse maps from another branch, which is not counted here.
        self.reduce = head.reduce if with_reduction else None
        self.semantic, self.boundary, self.context = head.semantic, head.boundary, head.context

    def forward(self, x: Tensor) -> Tensor:
        if self.reduce is not None:
            x = self.reduce(x)
        boundary, semantic = self.boundary(x)[:, 0].sigmoid(), self.semantic(x).softmax(1)
        out: Tensor = self.context(x, boundary, semantic)
        return out


class _RegionLogits(nn.Module):
    def __init__(self, head: RANetHead) -> None:
        super().__init__()
        self.part = _RegionContext(head, with_reduction=False)
        self.reduce, self.fuse, self.classifier = head.reduce, head.fuse, head.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        out: Tensor = self.classifier(self.fuse(torch.cat([x, self.part(x)], dim=1)))
        return out


def _ranet_scopes(variant: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """The same as `_scopes` of RANet's head."""

    def head() -> RANetHead:
        built = RANetHead(
            {"res5": ShapeSpec(channels=_BACKBONE_CHANNELS, stride=8)},
            num_classes=19,
            channels=shape[1],
            variant=variant,
            coarse_feature=None,
            norm="BN",
        )
        built.context.construction = _EqualRegions(variant=variant)
        return built

    backbone_map = (1, _BACKBONE_CHANNELS, *shape[2:])
    yield "module alone", lambda: _RegionContext(head(), with_reduction=False), shape
    yield "with reduction", lambda: _RegionContext(head(), with_reduction=True), backbone_map
    yield "whole head", lambda: _RegionLogits(head()), backbone_map


def _scopes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """(scope, how to build it, shape of its input) of a context module."""
    # The published DANet holds the attention map.
    options = {"backend": "matmul"} if name == "danet" else {}

    def head() -> CCNetHead:
        context = partial(build_context, name, channels=shape[1], activation="relu", **options)
        is_head = getattr(context(shape[1]), "standalone", False)
        return CCNetHead(
            {"res5": ShapeSpec(channels=_BACKBONE_CHANNELS, stride=8)},
            num_classes=19,
            channels=shape[1],
            context=context(_BACKBONE_CHANNELS if is_head else shape[1]),
            norm="BN",
            aux_feature=None,
        )

    backbone_map = (1, _BACKBONE_CHANNELS, *shape[2:])
    yield "module alone", partial(build_context, name, shape[1], shape[1], **options), shape
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
