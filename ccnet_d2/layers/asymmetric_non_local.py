"""Asymmetric non-local attention: every position attends over a few pooled ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cell_average import cell_average
from .context_module import ContextModule
from .non_local import attention_matmul
from .norm_act import ActivationLike, ConvNormAct, NormLike


class AsymmetricNonLocal(ContextModule):
    """Asymmetric pyramid non-local block (APNB), the form of the paper that has one input and one output map.

    Query and key share one projection; key and value are pooled to pyramids of 1, 3x3, 6x6 and 8x8 averages,
    which leaves 110 keys for a map of any size. Energies are scaled by 1/sqrt(C'). A zero-initialised 1x1
    convolution brings the result back to C channels, and a 1x1 convolution fuses it with the input by
    concatenation. The paper's other block (AFNB) fuses two stages of the backbone, hence is no context
    module.

    :paper:`Asymmetric Non-local Neural Networks for Semantic Segmentation`, Sec. 3.2 and 3.4; RANet, Tab. 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        bins: Sequence[int] = (1, 3, 6, 8),
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
    ) -> None:
        """
        Args:
            channels: C, of input and output.
            key_channels: C', of query, key and value; None: half of C (256 of 512), at least 1.
            bins: cells per side of each level of the pyramid.
            norm: name or callable.
            activation: name or callable.

        Raises:
            ValueError: key_channels below 1, no bins, or a bin below 1.
        """
        super().__init__(channels)
        width = max(1, channels // 2) if key_channels is None else key_channels
        if width < 1:
            raise ValueError(f"key_channels must be at least 1, got {width}.")
        if not bins or min(bins) < 1:
            raise ValueError(f"bins must be one or more numbers of at least 1, got {tuple(bins)}.")
        self.bins = tuple(bins)
        self.key_channels = width
        self.query_key = ConvNormAct(channels, width, norm=norm, activation=activation)
        self.value = nn.Conv2d(channels, width, kernel_size=1)
        self.project = nn.Conv2d(width, channels, kernel_size=1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]
        self.fuse = ConvNormAct(2 * channels, channels, norm=norm, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self._check_input(x)
        query = self.query_key(x)
        key, value = self._pool(query), self._pool(self.value(x))
        out = attention_matmul(query.flatten(2) * self.key_channels**-0.5, key, value)
        context = self.project(out.reshape(query.shape))
        fused: Tensor = self.fuse(torch.cat([context, x], dim=1))
        return fused

    def _pool(self, x: Tensor) -> Tensor:
        """(B, C', H, W) -> (B, C', sum of bins squared)."""
        return torch.cat([cell_average(x, size).flatten(2) for size in self.bins], dim=2)
