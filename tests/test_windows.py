"""Windows that cover a line, against the grid whose ends are moved back."""

import pytest

from ccnet_d2.windows import window_starts


def starts_by_moving_back(size, window, stride):
    """Those of the tiles of mmseg's slide_inference: a regular grid, each end clipped and its start moved back."""
    count = max(size - window + stride - 1, 0) // stride + 1
    ends = [min(index * stride + window, size) for index in range(count)]
    return [max(end - window, 0) for end in ends]


@pytest.mark.parametrize("size", [1, 5, 8, 9, 13, 31, 64])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 5), (8, 1), (7, 3), (64, 43)])
def test_they_cover_everything_and_are_those_of_the_grid(size, window, stride):
    starts = window_starts(size, window, stride)
    assert starts == starts_by_moving_back(size, window, stride)
    covered = {place for start in starts for place in range(start, min(start + window, size))}
    assert covered == set(range(size))
    assert len(set(starts)) == len(starts)
