"""Chunks of channels that a layer with recompute works in."""

_MULTIPLE = 16  # channels; fewer do not fill the vectors of the kernels


def backward_chunks(channels: int, count: int) -> list[slice]:
    """At most so many chunks, each but the last with a multiple of 16 channels.

    None is larger than all after it together: the value of a chunk has its place where the gradients of later ones will
    lie. The last one, whose value has none, is half as large as the first ones. One map of C / (count - 1) channels so
    is the most that is held beside, where equal chunks would need two of C / count.
    """
    if count == 1:
        return [slice(0, channels)]
    largest = _round_up(-(-channels // (count - 1)))
    chunks: list[slice] = []
    first = 0
    while channels - first > largest // 2 and len(chunks) < count - 1:
        half = (channels - first) // 2 // _MULTIPLE * _MULTIPLE
        if half == 0:
            break
        last = first + min(largest, half)
        chunks.append(slice(first, last))
        first = last
    return [*chunks, slice(first, channels)]


def forward_chunks(channels: int, key_channels: int, count: int) -> list[slice]:
    """Chunks that the forward pass can hold two maps of in the memory that the backward pass needs with `count` chunks.

    That is one map of its largest chunk, and the gradients of query and key.
    """
    if count == 1:
        return [slice(0, channels)]
    largest = max(chunk.stop - chunk.start for chunk in backward_chunks(channels, count))
    size = _round_up(largest // 2 + key_channels)
    return [slice(first, min(first + size, channels)) for first in range(0, channels, size)]


def _round_up(channels: int) -> int:
    return -(-channels // _MULTIPLE) * _MULTIPLE
