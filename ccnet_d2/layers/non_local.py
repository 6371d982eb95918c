"""Non-local attention: every position attends over all positions.

Shapes: B batch, C channels, C' query/key channels, N number of positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccnet_d2.choices import check_choice

from .context_module import CONVOLUTIONS, ContextModule, check_recurrence, key_channels
from .precision import at_least_float32, autocast_disabled

BACKENDS = ("sdpa", "matmul")


class NonLocal(ContextModule):
    """Non-local block in RCCA's place: `gamma * softmax(q k^T) v + x`, R times with shared weights.

    The projections are those of criss-cross attention (q, k: C -> C/8, v: C -> C, biased, no output
    convolution), there is no 1/sqrt(C') scale, and `gamma` starts at 0: only the set of keys differs. That is
    the "+NL" of CCNet (TPAMI, Tab. 4 and 5), whose printed cost this layer has, and the position attention of
    DANet.

    :paper:`Non-local Neural Networks` (embedded Gaussian form); :paper:`CCNet` (TPAMI), Sec. 4.3.
    """

    def __init__(
        self,
        channels: int,
        recurrence: int = 1,
        spatial_dims: int = 2,
        *,
        reduction: int = 8,
        backend: str = "sdpa",
    ) -> None:
        """
        Args:
            channels: C, of input and output.
            recurrence: R, the number of loops, at least 1 ("+NL(R=2)" of Tab. 5 is 2).
            spatial_dims: 2 for (B, C, H, W), 3 for (B, C, T, H, W), 1 for (B, C, W).
            reduction: C' = channels / reduction.
            backend: "sdpa" never holds the (N, N) attention map (memory linear in N; kernels of
                `torch.nn.functional.scaled_dot_product_attention`); "matmul" does, as the published modules
                do, and is what the papers' memory figures mean.

        Raises:
            ValueError: channels is not a positive multiple of reduction, recurrence is below 1, spatial_dims
                is not 1, 2 or 3, or the backend is unknown.
        """
        super().__init__(channels, spatial_dims=spatial_dims)
        check_recurrence(recurrence)
        check_choice("backend", backend, BACKENDS)
        self.channels = channels
        self.key_channels = key_channels(channels, reduction)
        self.recurrence = recurrence
        self.backend = backend
        self.qkv = CONVOLUTIONS[spatial_dims](channels, 2 * self.key_channels + channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        self._check_input(x)
        attention = attention_sdpa if self.backend == "sdpa" else attention_matmul
        for _ in range(self.recurrence):
            qkv = self.qkv(x).flatten(2)
            query, key, value = qkv.split([self.key_channels, self.key_channels, self.channels], dim=1)
            out = attention(query, key, value).reshape(x.shape)
            x = self.gamma.to(out.dtype) * out + x
        return x

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, key_channels={self.key_channels}, recurrence={self.recurrence}, "
            f"spatial_dims={self.spatial_dims}, backend={self.backend!r}"
        )


def attention_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q^T k) over the keys, applied to the values, with the attention map in memory.

    Energies and softmax are fp32 (fp64 for fp64 inputs) whatever the inputs, inside autocast too: without a
    scale, fp16 energies overflow.

    Args:
        query: (B, C', Nq).
        key: (B, C', Nk).
        value: (B, C, Nk).

    Returns:
        (B, C, Nq), of value's dtype.
    """
    with autocast_disabled(query.device):
        energy = torch.bmm(at_least_float32(query).transpose(1, 2), at_least_float32(key))
        attention = energy.softmax(dim=-1).to(value.dtype)
        return torch.bmm(value, attention.transpose(1, 2))


def attention_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same as `attention_matmul` in memory linear in the number of positions.

    The fused kernels want values as wide as queries, so the value channels are cut into pieces of C' that
    become heads sharing one query and key. Each head computes the energies again: at C = 8 C' the arithmetic
    is 1.8 times that of `attention_matmul`, in exchange for the (Nq, Nk) map.

    Args:
        query: (B, C', Nq).
        key: (B, C', Nk).
        value: (B, C, Nk).

    Returns:
        (B, C, Nq), of value's dtype.
    """
    batch, width, queries = query.shape
    channels, keys = value.shape[1:]
    heads = -(-channels // width)
    if heads * width != channels:
        value = F.pad(value, (0, 0, 0, heads * width - channels))
    # (B, heads, N, C') with each position's channels adjacent: other strides send SDPA to its slow fallback.
    value = value.reshape(batch, heads, width, keys).transpose(2, 3).contiguous()
    query, key = (t.transpose(1, 2).contiguous().unsqueeze(1).expand(-1, heads, -1, -1) for t in (query, key))
    out = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return out.transpose(2, 3).reshape(batch, heads * width, queries)[:, :channels]
