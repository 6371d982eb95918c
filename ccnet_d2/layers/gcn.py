"""Global convolution: large kernels made of two thin ones."""

from torch import Tensor, nn

from .context_module import ContextModule


class GlobalConvolution(ContextModule):
    """The sum of a k x 1 then 1 x k and of a 1 x k then k x 1 convolution, no norm or activation in between.

    :paper:`Large Kernel Matters -- Improve Semantic Segmentation by Global Convolutional Network`, Fig. 3b.
    There the block maps to as many channels as classes; here, in RCCA's place (:paper:`CCNet` (TPAMI), Tab.
    4, "+GCN"), it keeps the number of channels, and `mid_channels` sets the width between the two thin
    convolutions.
    """

    def __init__(self, channels: int, *, kernel_size: int = 15, mid_channels: int | None = None) -> None:
        """
        Args:
            channels: C, of input and output.
            kernel_size: k, odd; 15 is the paper's best.
            mid_channels: channels between the two convolutions of a branch; None: C.

        Raises:
            ValueError: kernel_size is even or below 1, or mid_channels is below 1.
        """
        super().__init__(channels)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}.")
        mid = channels if mid_channels is None else mid_channels
        if mid < 1:
            raise ValueError(f"mid_channels must be at least 1, got {mid}.")
        tall, wide = (kernel_size, 1), (1, kernel_size)
        pad = kernel_size // 2
        self.tall_wide = nn.Sequential(
            nn.Conv2d(channels, mid, tall, padding=(pad, 0)), nn.Conv2d(mid, channels, wide, padding=(0, pad))
        )
        self.wide_tall = nn.Sequential(
            nn.Conv2d(channels, mid, wide, padding=(0, pad)), nn.Conv2d(mid, channels, tall, padding=(pad, 0))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self._check_input(x)
        out: Tensor = self.tall_wide(x) + self.wide_tall(x)
        return out
