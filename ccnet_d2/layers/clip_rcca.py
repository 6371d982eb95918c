"""3D criss-cross attention inside a network that runs frame by frame.

Shapes: B clips, T frames of a clip, C channels, H W feature size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .criss_cross import RCCA


class ClipRCCA(RCCA):
    """RCCA over time, height and width, on a batch of frames: (B·T, C, H, W) to the same shape.

    The frames of a clip stand one after the other; how many there are is said by `clips_of` around the call:

        with clips_of(model, frames=5):
            model(batch)  # frames 0-4 are a clip, 5-9 the next, ...

    Its parameters are those of the 2D layer, a 1x1x1 convolution being a 1x1 one: checkpoints of a 2D network load as
    they are, and with T=1 the two are the same function.

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`, Sec. 3.5.
    """

    def __init__(
        self,
        channels: int,
        recurrence: int = 3,
        *,
        reduction: int = 8,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        """
        Args:
            channels: C, of input and output.
            recurrence: R; with 3 every position has seen the whole clip.
            reduction: C' = channels / reduction.
            backend: see `ccnet_d2.ops.criss_cross_attention`.
            recompute: as in `CrissCrossAttention`.

        Raises:
            ValueError: as in `RCCA`.
        """
        super().__init__(channels, recurrence, reduction=reduction, backend=backend, recompute=recompute)
        self.frames = 1

    def forward(self, x: Tensor) -> Tensor:
        """(B·T, C, H, W) -> (B·T, C, H, W).

        Raises:
            ValueError: the number of frames is not a multiple of T, or the input has other axes or channels.
        """
        self._check_input(x)
        if x.shape[0] % self.frames:
            raise ValueError(f"{x.shape[0]} frames do not make clips of {self.frames}.")
        clips = x.unflatten(0, (-1, self.frames)).transpose(1, 2)
        return self._recur(clips).transpose(1, 2).flatten(0, 1)


@contextmanager
def clips_of(model: nn.Module, frames: int) -> Iterator[None]:
    """Within the block every `ClipRCCA` of the model takes its batch as clips of so many frames; else as of one.

    Raises:
        ValueError: frames is below 1.
    """
    if frames < 1:
        raise ValueError(f"a clip has at least 1 frame, got frames={frames}.")
    layers = [module for module in model.modules() if isinstance(module, ClipRCCA)]
    before = [layer.frames for layer in layers]
    try:
        for layer in layers:
            layer.frames = frames
        yield
    finally:
        for layer, number in zip(layers, before, strict=True):
            layer.frames = number
