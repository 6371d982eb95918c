"""The largest value on the straight line between any two cells of a map (RANet, Eq. 1).

Shapes: B batch, H W size of the map, N = H W, P = N (N - 1) / 2 unordered pairs of cells.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

# Values looked at in one go: bounds the working memory, not the result's. A GPU gets more, since each round costs it
# hundreds of launches.
_CHUNK = 1 << 22
_TIMES_ON_GPU = 8
# Maps of up to so many cells have the points of all lines kept for the next time, some 20 MB.
_KEPT_CELLS = 700


def line_maximum(values: Tensor, *, ends: bool = True, samples: int | None = None) -> Tensor:
    """D_ij, the maximum of a map over the line from cell i to cell j, for all pairs.

    The line is walked in whole steps along its longer axis; between two cells of the shorter axis the value is
    interpolated linearly (RANet, Fig. 2). All of these points are looked at unless `samples` is given. The gradient
    goes to the point that is the maximum, in a tie to the first one seen from the cell of the smaller index, and
    there to the two cells that it lies between.

    One table of N^2 values is returned; the working memory beyond it is bounded, and the backward pass keeps two
    bytes for each pair and image.

    :paper:`RANet`, Sec. 3.1, Eq. 1.

    Args:
        values: (B, H, W) floating point.
        ends: whether the two cells themselves belong to the line. Without them neighbours have no point between
            them, and their D is 0, as is D_ii.
        samples: look at no more than this many points between the ends, evenly spread; None for all of them.

    Returns:
        (B, N, N), symmetric, in the dtype of `values`.

    Raises:
        ValueError: `values` is not (B, H, W), or `samples` is below 1.
    """
    if values.dim() != 3:
        raise ValueError(f"expected a map (B, H, W), got {tuple(values.shape)}.")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, or None for all points, got {samples}.")
    table: Tensor = _LineMaximum.apply(values, ends, samples)
    return table


class _Pairs:
    """All pairs i < j of a map's cells, the longest lines first, so that those with a t-th point come first."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        cells = torch.arange(height * width, device=device)
        first, second = torch.triu_indices(len(cells), len(cells), 1, device=device)
        rows, columns = cells // width, cells % width
        self.down = (rows[second] - rows[first]).to(torch.int32)
        self.right = (columns[second] - columns[first]).to(torch.int32)
        steps = torch.maximum(self.down, self.right.abs())
        steps, order = steps.sort(descending=True, stable=True)
        self.steps = steps
        self.first, self.second = first[order].to(torch.int32), second[order].to(torch.int32)
        self.down, self.right = self.down[order], self.right[order]
        self.width = width

    def __len__(self) -> int:
        return len(self.steps)

    def points(self, chosen: slice, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two cells around the point after `step` whole steps from the first cell, and the weight of the second.

        Args:
            chosen: P' of the pairs.
            step: (P',) or (P', B) integers from 0 to the pair's number of steps.
        """
        more = (slice(None),) + (None,) * (step.dim() - 1)
        steps = self.steps[chosen][more].float()
        down = self.down[chosen][more]
        right = self.right[chosen][more]
        # Quotients of integers this small are exact where they are whole, so floor and weight are right.
        y, x = step * down / steps, step * right / steps
        row, column = y.floor(), x.floor()
        weight = (y - row) + (x - column)  # one of them is 0
        before = self.first[chosen][more].long() + row.long() * self.width + column.long()
        aside = torch.where(right.abs() >= down, self.width, 1)
        return before, before + aside * (weight > 0), weight


def _remembered(make: Callable[..., _T]) -> Callable[..., _T]:
    """What was made for the last few sizes is used again."""
    made = lru_cache(maxsize=4)(make)

    @wraps(make)
    def get(*arguments: Any) -> _T:
        # Costs are traced with tensors of another kind, which must not be kept.
        if type(torch.empty(0)) is not Tensor:
            return make(*arguments)
        with torch.inference_mode(False):
            return made(*arguments)

    return get


@_remembered
def _pairs(height: int, width: int, device: torch.device) -> _Pairs:
    return _Pairs(height, width, device)


class _Point(NamedTuple):
    """The points of one number on the lines that have as many: of the first `lines` of some pairs.

    Attributes:
        lines: P'.
        step: (P',) int16, whole steps from the first cell.
        before, after: (P',) int32, the cells around.
        weight: (P', 1), of the second of them.
    """

    lines: int
    step: Tensor
    before: Tensor
    after: Tensor
    weight: Tensor


def _points(pairs: _Pairs, chosen: slice, ends: bool, samples: int | None) -> Iterator[_Point]:
    """The points of some pairs' lines, from the first cell on."""
    steps = pairs.steps[chosen]
    between = steps - 1 if samples is None else (steps - 1).clamp(max=samples)
    # How many pairs have a point of each number: sorted by length, they are the first ones.
    counts = torch.bincount(between, minlength=1).flip(0).cumsum(0).flip(0).tolist()
    candidates = [torch.zeros_like(steps)] if ends else []
    for number, count in enumerate(counts[1:], start=1):
        spread = between[:count] + 1  # the points cut the line into as many parts
        candidates.append((number * steps[:count] + spread // 2) // spread)
    if ends:
        candidates.append(steps)
    for step in candidates:
        part = slice(chosen.start, chosen.start + len(step))
        before, after, weight = pairs.points(part, step)
        yield _Point(len(step), step.short(), before.int(), after.int(), weight[:, None])


@_remembered
def _all_points(
    height: int, width: int, device: torch.device, ends: bool, samples: int | None
) -> list[_Point]:
    """Those of all pairs of a small map, to be used again."""
    pairs = _pairs(height, width, device)
    return list(_points(pairs, slice(0, len(pairs)), ends, samples))


class _LineMaximum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ends: bool, samples: int | None) -> Tensor:
        batch, height, width = values.shape
        cells = height * width
        flat = values.detach().reshape(batch, cells).t().contiguous()  # (N, B): a cell's values are adjacent
        pairs = _pairs(height, width, values.device)
        best = flat.new_full((len(pairs), batch), -torch.inf)
        at = torch.full((len(pairs), batch), -1, dtype=torch.int16, device=values.device)
        size = _lines_at_once(values)
        for start in range(0, len(pairs), size):
            chosen = slice(start, min(start + size, len(pairs)))
            points: Iterable[_Point] = (
                _all_points(height, width, values.device, ends, samples)
                if cells <= _KEPT_CELLS and len(pairs) <= size
                else _points(pairs, chosen, ends, samples)
            )
            _walk(flat, points, best[chosen], at[chosen])
        if not ends:  # neighbours have no point between them
            best = best.where(at >= 0, 0)
        table = flat.new_zeros(batch, cells, cells)
        upper = best.t()
        first, second = pairs.first.long(), pairs.second.long()
        table[:, first, second] = upper
        table[:, second, first] = upper
        if ends:
            table.diagonal(dim1=1, dim2=2).copy_(flat.t())
        ctx.save_for_backward(at)
        ctx.shape, ctx.ends = values.shape, ends
        return table

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        batch, height, width = ctx.shape
        pairs = _pairs(height, width, grad.device)
        out = grad.new_zeros(height * width * batch)
        images = torch.arange(batch, device=grad.device)
        size = _lines_at_once(grad)
        for start in range(0, len(pairs), size):
            chosen = slice(start, min(start + size, len(pairs)))
            first, second = pairs.first[chosen].long(), pairs.second[chosen].long()
            both = (grad[:, first, second] + grad[:, second, first]).t()
            step = at[chosen]
            both = both.masked_fill(step < 0, 0)
            before, after, weight = pairs.points(chosen, step.clamp(min=0).int())
            weight = weight.to(both.dtype)
            out.index_add_(0, (before * batch + images).flatten(), (both * (1 - weight)).flatten())
            out.index_add_(0, (after * batch + images).flatten(), (both * weight).flatten())
        result = out.view(height * width, batch).t().reshape(ctx.shape)
        if ctx.ends:
            result = result + grad.diagonal(dim1=1, dim2=2).reshape(ctx.shape)
        return result, None, None


def _lines_at_once(values: Tensor) -> int:
    """How many lines of each image of a batch (B, ...) are walked together."""
    return max(1, _CHUNK * (1 if values.device.type == "cpu" else _TIMES_ON_GPU) // max(1, values.shape[0]))


def _walk(flat: Tensor, points: Iterable[_Point], best: Tensor, at: Tensor) -> None:
    """Maximum along each of some pairs' lines into `best`, and at which step it lies into `at`; both (P, B)."""
    for point in points:
        before, after = flat.index_select(0, point.before), flat.index_select(0, point.after)
        value = before.lerp_(after, point.weight.to(flat.dtype))
        so_far, step_so_far = best[: point.lines], at[: point.lines]
        better = value > so_far
        torch.maximum(so_far, value, out=so_far)
        torch.where(better, point.step[:, None], step_so_far, out=step_so_far)
