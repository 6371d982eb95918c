"""Line maximum: against a walk along every line in exact fractions, and its gradient against autograd through that."""

import contextlib
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ccnet_d2.layers.region_lines import line_maximum


def points(a: tuple[int, int], b: tuple[int, int], ends: bool) -> list[tuple[Fraction, Fraction]]:
    """The points of the line from a to b, in whole steps along its longer axis."""
    steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]))
    if steps == 0:
        return [(Fraction(a[0]), Fraction(a[1]))] if ends else []
    chosen = range(0, steps + 1) if ends else range(1, steps)
    return [tuple(p + Fraction(t * (q - p), steps) for p, q in zip(a, b, strict=True)) for t in chosen]


def interpolated(values: Tensor, point: tuple[Fraction, Fraction]) -> Tensor:
    """Bilinear, by its definition."""
    total = values.new_zeros(())
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            weight = max(0, 1 - abs(point[0] - row)) * max(0, 1 - abs(point[1] - column))
            if weight:
                total = total + float(weight) * values[row, column]
    return total


def brute_force(values: Tensor, ends: bool) -> Tensor:
    cells = [(r, c) for r in range(values.shape[0]) for c in range(values.shape[1])]
    rows = []
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            # From the smaller index on, as ties are settled.
            seen = points(a, b, ends) if i <= j else points(b, a, ends)
            rows.append(
                torch.stack([interpolated(values, p) for p in seen]).amax() if seen else values.new_zeros(())
            )
    return torch.stack(rows).reshape(len(cells), len(cells))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("size", [(4, 5), (1, 7), (6, 1), (1, 1)])
def test_equals_a_walk_along_every_line(size, ends):
    torch.manual_seed(0)
    values = torch.rand(2, *size, dtype=torch.float64, requires_grad=True)
    table = line_maximum(values, ends=ends)
    expected = torch.stack([brute_force(image, ends) for image in values])
    torch.testing.assert_close(table, expected)
    assert torch.equal(table, table.transpose(1, 2))
    if not table.requires_grad or not expected.requires_grad:
        return
    weights = torch.rand_like(table)
    (grad,) = torch.autograd.grad((table * weights).sum(), values)
    (grad_expected,) = torch.autograd.grad((expected * weights).sum(), values, allow_unused=True)
    torch.testing.assert_close(grad, grad_expected)


def test_gradient_by_differences():
    torch.manual_seed(1)
    # Random values are far enough apart that no step of gradcheck changes where a maximum lies.
    values = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(line_maximum, (values,))


def test_sampled_lines_see_a_part_and_all_of_it_in_the_end():
    torch.manual_seed(0)
    values = torch.rand(1, 7, 9)
    exact = line_maximum(values)
    few = line_maximum(values, samples=2)
    assert (few <= exact).all() and (few < exact).any()
    torch.testing.assert_close(line_maximum(values, samples=7), exact)  # 9 cells: at most 7 points between
    # Short lines have no more points than samples, so they are exact.
    near = [
        (i, j) for i in range(63) for j in range(63) if max(abs(i // 9 - j // 9), abs(i % 9 - j % 9)) <= 3
    ]
    rows, columns = zip(*near, strict=True)
    assert torch.equal(few[0, rows, columns], exact[0, rows, columns])
    # One sample of a long line is its middle.
    line = torch.zeros(1, 1, 9)
    line[0, 0, 4] = 1
    assert line_maximum(line, samples=1)[0, 0, 8] == 1 and line_maximum(line.roll(1), samples=1)[0, 0, 8] == 0


def test_a_wall_separates_and_a_gap_does_not():
    values = torch.zeros(1, 5, 5)
    values[0, :, 2] = 1
    table = line_maximum(values).reshape(5, 5, 5, 5)
    assert (table[:, :2, :, 3:] >= 0.5).all()  # a steep line may pass between two of its points
    assert (table[:, :2, :, :2] == 0).all()
    values[0, 2, 2] = 0
    assert line_maximum(values).reshape(5, 5, 5, 5)[2, 0, 2, 4] == 0


def test_memory_of_chunks_does_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    values = torch.rand(2, 6, 5, requires_grad=True)
    whole = line_maximum(values)
    (grad,) = torch.autograd.grad(whole.sin().sum(), values)
    monkeypatch.setattr("ccnet_d2.layers.region_lines._CHUNK", 40)
    parts = line_maximum(values)
    assert torch.equal(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sin().sum(), values)[0], grad)


def test_what_is_kept_for_the_next_time_serves_training_after_inference_and_after_tracing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), contextlib.suppress(RuntimeError):  # the number of points depends on values
        line_maximum(torch.rand(1, 3, 8))
    with torch.inference_mode():
        expected = line_maximum(torch.full((1, 3, 8), 0.5)).clone()
    values = torch.full((1, 3, 8), 0.5, requires_grad=True)
    table = line_maximum(values)
    table.sum().backward()
    assert torch.equal(table, expected) and values.grad.sum() == 24**2


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"map \(B, H, W\)"):
        line_maximum(torch.rand(3, 3))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        line_maximum(torch.rand(1, 3, 3), samples=0)
