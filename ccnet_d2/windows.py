"""Windows of one size that cover a line: the tiles of an image along an axis, the clips of a video."""

__all__ = ["window_starts"]


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows start among `size` places: every `stride`, the last one moved back to end with them.

    A 1024x2048 image with tile 769 and stride 513 gives 2 x 4 tiles, as the official CCNet evaluation.
    """
    last = max(size - window, 0)
    return [*range(0, last, stride), last]
