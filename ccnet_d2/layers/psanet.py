"""Point-wise spatial attention.

Shapes: B batch, C channels, h w the shrunk map, N = h w, M = mask rows x mask columns.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context_module import ContextModule
from .norm_act import ActivationLike, ConvNormAct, NormLike
from .precision import at_least_float32, autocast_disabled


class PSANet(ContextModule):
    """Bi-directional point-wise spatial attention: each position predicts, by its relative place to all
    others, how much it takes from each ("collect") and how much it gives to each ("distribute").

    Two branches reduce the map to `out_channels`, shrink it, and predict M = mask_size squared logits per
    position, one for each relative displacement. Attention of target i over source j is the softmax over j of
    the logit that i (collect) or j (distribute) predicts for their displacement. The two results are
    concatenated, projected back to the input's channels, enlarged, concatenated to the input and fused by a
    3x3 convolution.

    Standalone: in `in_channels` (res5) -> `out_channels`. The defaults (mask 97x97 on the map shrunk by 2)
    cover every displacement up to a 97x97 map, hence a 769x769 crop at stride 8. On larger maps displacements
    outside the mask have no logit and take no part in the softmax.

    :paper:`PSANet: Point-wise Spatial Attention Network for Scene Parsing`, Sec. 3; RANet, Tab. 3.
    """

    standalone: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        mask_size: int = 97,
        shrink_factor: int = 2,
        norm: NormLike = "BN",
        activation: ActivationLike = "relu",
    ) -> None:
        """
        Args:
            channels: C, of the input.
            out_channels: of the output and of both attentions; None: C.
            mask_size: side of the square of displacements, odd; 2 s - 1 covers shrunk maps of side s.
            shrink_factor: a map of side n is attended over at side (n - 1) // shrink_factor + 1.
            norm: name or callable.
            activation: name or callable.

        Raises:
            ValueError: mask_size is even or below 1, or shrink_factor is below 1.
        """
        super().__init__(channels, out_channels)
        if mask_size < 1 or mask_size % 2 == 0:
            raise ValueError(f"mask_size must be odd and at least 1, got {mask_size}.")
        if shrink_factor < 1:
            raise ValueError(f"shrink_factor must be at least 1, got {shrink_factor}.")
        self.mask_size = mask_size
        self.shrink_factor = shrink_factor
        width = self.out_channels

        def reduce() -> ConvNormAct:
            return ConvNormAct(channels, width, norm=norm, activation=activation)

        def predict() -> nn.Sequential:
            return nn.Sequential(
                ConvNormAct(width, width, norm=norm, activation=activation),
                nn.Conv2d(width, mask_size**2, kernel_size=1, bias=False),
            )

        self.collect_reduce, self.collect_mask = reduce(), predict()
        self.distribute_reduce, self.distribute_mask = reduce(), predict()
        self.project = ConvNormAct(2 * width, channels, norm=norm, activation=activation)
        self.fuse = ConvNormAct(2 * channels, width, 3, norm=norm, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        self._check_input(x)
        full = (x.shape[-2], x.shape[-1])
        small = ((full[0] - 1) // self.shrink_factor + 1, (full[1] - 1) // self.shrink_factor + 1)
        collected = _resize(self.collect_reduce(x), small)
        distributed = _resize(self.distribute_reduce(x), small)
        displacement, covered = self._displacements(small, x.device)
        # Row i reads the logits that i predicted: over sources of target i when collecting, over targets of
        # source i when distributing, which is why the second is transposed to (target, source).
        collect = _gather(self.collect_mask(collected), displacement)
        distribute = _gather(self.distribute_mask(distributed), displacement).transpose(1, 2)
        context = torch.cat(
            [_attend(collected, collect, covered), _attend(distributed, distribute, covered)], dim=1
        )
        context = _resize(self.project(context), full)
        out: Tensor = self.fuse(torch.cat([x, context], dim=1))
        return out

    def _displacements(self, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """For positions i, j of a map: the mask channel of displacement j - i, and whether the mask has it;
        (N, N)."""
        half = self.mask_size // 2
        rows = torch.arange(size[0], device=device)
        columns = torch.arange(size[1], device=device)
        dy = (rows[None, :] - rows[:, None] + half)[:, None, :, None]
        dx = (columns[None, :] - columns[:, None] + half)[None, :, None, :]
        inside_y = (dy >= 0) & (dy < self.mask_size)
        inside_x = (dx >= 0) & (dx < self.mask_size)
        last = self.mask_size - 1
        channel = dy.clamp(0, last) * self.mask_size + dx.clamp(0, last)
        positions = size[0] * size[1]
        return channel.reshape(positions, positions), (inside_y & inside_x).reshape(positions, positions)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    # Sizes are symbols while torch exports or compiles; see `losses.resize.upsample`.
    if not torch.compiler.is_compiling() and tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def _gather(mask: Tensor, channel: Tensor) -> Tensor:
    """mask (B, M, h, w), channel (N, N) -> (B, N, N): for position i, its logits at the channels
    channel[i]."""
    rows = mask.flatten(2).transpose(1, 2)
    return rows.gather(2, channel.expand(rows.shape[0], -1, -1))


def _attend(features: Tensor, logits: Tensor, covered: Tensor) -> Tensor:
    """features (B, C, h, w), logits (B, target, source), covered (target, source) -> (B, C, h, w)."""
    with autocast_disabled(features.device):
        wide = at_least_float32(logits)
        attention = wide.masked_fill(~covered, float("-inf")).softmax(dim=-1).to(features.dtype)
        return torch.bmm(features.flatten(2), attention.transpose(1, 2)).reshape(features.shape)
