"""The chunks of channels that a layer with recompute works in, by what is said of them."""

import pytest

from ccnet_d2.ops.chunks import backward_chunks, forward_chunks


def widths(chunks):
    return [chunk.stop - chunk.start for chunk in chunks]


def covers(chunks, channels):
    return [c for chunk in chunks for c in range(channels)[chunk]] == list(range(channels))


def held(widths):
    """The most channels held beside the gradients: one map of a chunk, and its value where no later one has room."""
    return max(
        width + (width if width > sum(widths[place + 1 :]) else 0) for place, width in enumerate(widths)
    )


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 40, 64, 96, 250, 256, 512, 720, 2048])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 100])
def test_backward_chunks(channels, count):
    chunks = backward_chunks(channels, count)
    assert covers(chunks, channels) and 1 <= len(chunks) <= count
    *first, _ = widths(chunks)
    assert all(width > 0 and width % 16 == 0 for width in first)
    for place, width in enumerate(first):
        assert width <= sum(widths(chunks)[place + 1 :])
    equal = max(-(-channels // count), 16)
    assert held(widths(chunks)) <= 2 * (equal + 15)  # rounding to 16


@pytest.mark.parametrize(
    ("count", "wanted", "most"),
    [
        (1, [512], 1024),
        (2, [256, 256], 512),
        (3, [256, 128, 128], 256),
        (4, [176, 160, 80, 96], 192),
        (5, [128, 128, 128, 64, 64], 128),
        (8, [80, 80, 80, 80, 80, 48, 32, 32], 80),
        (10, [64, 64, 64, 64, 64, 64, 64, 32, 32], 64),
    ],
)
def test_chunks_of_512_channels(count, wanted, most):
    assert widths(backward_chunks(512, count)) == wanted and held(wanted) == most


@pytest.mark.parametrize(("channels", "key_channels"), [(17, 2), (64, 8), (512, 64), (2048, 256), (512, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_forward_chunks_hold_no_more(channels, key_channels, count):
    chunks = forward_chunks(channels, key_channels, count)
    assert covers(chunks, channels)
    beside = held(widths(backward_chunks(channels, count))) + 2 * key_channels
    assert 2 * max(widths(chunks)) <= beside + 2 * 15  # rounding up
    if count == 1:
        assert len(chunks) == 1
    elif count > 2:  # nor less than they may: more chunks take more time
        assert 2 * max(widths(chunks)) > beside - 2 * 16 or len(chunks) == 1
