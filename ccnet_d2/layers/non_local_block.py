"""The non-local block as it is inserted into detection backbones.

Shapes: B batch, C channels, C' query/key channels, S spatial axes.
"""

from torch import Tensor, nn

from ccnet_d2.choices import check_choice

from .context_module import ContextModule, check_recurrence, key_channels
from .non_local import BACKENDS, attention_matmul, attention_sdpa
from .norm_act import NormLike, build_norm


class NonLocalBlock(ContextModule):
    """`norm(W softmax(theta(x) phi(x)^T) g(x)) + x`, R times with shared weights; the identity at the start.

    theta, phi and g are 1x1 convolutions C -> C/2 with bias, held as one, `qkv`; W is a 1x1 convolution C/2 -> C.
    The scale of the norm behind it (or W itself, without a norm) starts at 0. There is no 1/sqrt(C') scale. The
    "+NL" of the Mask R-CNN table is this block; in the segmentation head it is `NonLocal`.

    :paper:`Non-local Neural Networks`, Sec. 3.3 and 4.1 (embedded Gaussian form); :paper:`CCNet` (TPAMI), Sec. 4.6.
    """

    def __init__(
        self,
        channels: int,
        recurrence: int = 1,
        *,
        reduction: int = 2,
        norm: NormLike = "BN",
        backend: str = "sdpa",
    ) -> None:
        """
        Args:
            channels: C, of input and output.
            recurrence: R, the number of loops, at least 1 ("+NL(R=2)" is 2).
            reduction: C' = channels / reduction, of theta, phi and g.
            norm: of the output; see `NormLike`. A frozen norm would hold its scale at 0 and teach nothing.
            backend: as in `NonLocal`.

        Raises:
            ValueError: channels is not a positive multiple of reduction, recurrence is below 1, or the norm or the
                backend is unknown.
        """
        super().__init__(channels)
        check_recurrence(recurrence)
        check_choice("backend", backend, BACKENDS)
        self.recurrence = recurrence
        self.key_channels = key_channels(channels, reduction)
        self.backend = backend
        self.qkv = nn.Conv2d(channels, 3 * self.key_channels, kernel_size=1)
        self.norm = build_norm(norm, channels)
        self.out = nn.Conv2d(self.key_channels, channels, kernel_size=1, bias=self.norm is None)
        last = self.out if self.norm is None else self.norm
        scale, shift = getattr(last, "weight", None), getattr(last, "bias", None)
        if not isinstance(scale, nn.Parameter):
            raise ValueError(
                f"norm {type(last).__name__} has no learned scale, so the block could not learn."
            )
        nn.init.zeros_(scale)
        if isinstance(shift, nn.Parameter):
            nn.init.zeros_(shift)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self._check_input(x)
        attention = attention_sdpa if self.backend == "sdpa" else attention_matmul
        for _ in range(self.recurrence):
            query, key, value = self.qkv(x).flatten(2).chunk(3, dim=1)
            out = self.out(attention(query, key, value).reshape(x.shape[0], self.key_channels, *x.shape[2:]))
            x = x + (out if self.norm is None else self.norm(out))
        return x

    def extra_repr(self) -> str:
        return (
            f"channels={self.in_channels}, key_channels={self.key_channels}, recurrence={self.recurrence}, "
            f"backend={self.backend!r}"
        )
