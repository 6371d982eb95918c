"""Criss-cross attention and its recurrent form (RCCA) as layers, on one to three spatial axes."""

import torch
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.ops import BACKENDS, criss_cross_attention
from ccnet_d2.ops.loop import criss_cross_loop, supports_loop
from ccnet_d2.ops.projection import project
from ccnet_d2.ops.recompute import recomputed_loops
from ccnet_d2.ops.residual import gated_residual
from ccnet_d2.ops.transforms import is_traced

from .context_module import CONVOLUTIONS, ContextModule, check_recurrence, key_channels

RECOMPUTED_CHUNKS = 5
"""Chunks of channels that `recompute=True` works in, at most."""

CHUNKS_OF_ONE_LOOP = 3
"""The same where there is one loop alone: more would not need less memory, of which most is held after the last one."""


class CrissCrossAttention(ContextModule):
    """`gamma * attention(q(x), k(x), v(x)) + x` over the lines through every position.

    The 1x1 projections of the paper are held as one convolution, `qkv`, whose output channels are C' of query, C' of
    key and C of value. `gamma` starts at 0, so that the layer starts as the identity (official code; Eq. 2 prints no
    gamma).

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`, Sec. 3.2.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        spatial_dims: int = 2,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        """
        Args:
            channels: C, of input and output.
            reduction: C' = channels / reduction.
            spatial_dims: 2 for (B, C, H, W), 3 for (B, C, T, H, W), 1 for (B, C, W).
            backend: see `ccnet_d2.ops.criss_cross_attention`.
            recompute: keep for the backward pass nothing but the input and the maps between the loops, and compute
                everything else there again, in chunks of channels: less than half the memory in training, more time.
                A number says how many chunks at most; more need less memory and more time.

        Raises:
            ValueError: channels is not a positive multiple of reduction, spatial_dims is not 1, 2 or 3, the backend is
                unknown, or recompute is neither a number of chunks nor True or False.
        """
        super().__init__(channels, spatial_dims=spatial_dims)
        check_choice("backend", backend, ("auto", *BACKENDS))
        if not hasattr(recompute, "__index__") or recompute < 0:
            raise ValueError(f"recompute must be True, False or a number of chunks, got {recompute!r}.")
        self.channels = channels
        self.key_channels = key_channels(channels, reduction)
        self.backend = backend
        self.recompute = recompute
        self.qkv = CONVOLUTIONS[spatial_dims](channels, 2 * self.key_channels + channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def project(self, x: Tensor, plain: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, *S) -> query (B, C', *S), key (B, C', *S), value (B, C, *S), channels-last in memory.

        The convolution is 1x1, hence one matrix product; written as such it reads NCHW and channels-last inputs in
        place and writes what the attention reads, whereas a convolution would answer in the layout it is given.

        `plain` is the convolution's weight, flat, and its bias, where they have been asked for already: a
        parametrisation such as spectral norm takes a step each time.
        """
        plain = plain or self._plain_projection()
        if plain is not None:
            projected = project(x, *plain)
        elif x.dim() == self.spatial_dims + 2:
            projected = self.qkv(x)
        else:  # the clips of `ClipRCCA`, frame by frame
            frames = x.transpose(1, 2)
            projected = self.qkv(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        query, key, value = projected.split([self.key_channels, self.key_channels, self.channels], dim=1)
        return query, key, value

    def _recomputes(self, x: Tensor) -> bool:
        """Whether `recompute` applies here."""
        return bool(self.recompute) and torch.is_grad_enabled() and x.numel() > 0 and not is_traced()

    def _recomputed(self, x: Tensor, *, loops: int) -> Tensor:
        """So many loops, of which little is kept: (B, C, *S) -> (B, C, *S)."""
        plain = self._plain_projection()
        if plain is None:
            raise RuntimeError(
                "A layer with recompute takes the weight and the bias of its qkv alone, which has hooks (of pruning or "
                "weight_norm, for instance), has no bias or was replaced: use recompute=False there."
            )
        chunks = self.recompute
        if chunks is True:
            chunks = RECOMPUTED_CHUNKS if loops > 1 else CHUNKS_OF_ONE_LOOP
        return recomputed_loops(
            x,
            *plain,
            self.gamma,
            self.key_channels,
            loops=loops,
            chunks=chunks,
            backend=self.backend,
        )

    def attend(self, x: Tensor, *, channels_last: bool | None = None) -> Tensor:
        """One loop of attention with its residual: (B, C, *S) -> (B, C, *S).

        `channels_last` says how the compiled operator's result is to lie in memory; like x if None.
        """
        if self._recomputes(x):
            return self._recomputed(x, loops=1)
        plain = self._plain_projection()
        # Compiled for any image size, the loop in one step would keep the projection as a view on four axes, on
        # which torch 2.14's compiler fails; query, key and value apart are views that it makes again.
        if plain is not None and not torch.compiler.is_compiling():
            tensors = x, *plain, self.gamma
            if supports_loop(*tensors, self.backend):
                return criss_cross_loop(*tensors, self.key_channels, channels_last=channels_last)
        out = criss_cross_attention(*self.project(x, plain), backend=self.backend)
        if self.backend in ("auto", "compiled"):
            return gated_residual(out, self.gamma, x)
        # Differentiable twice, as these backends are.
        return self.gamma.to(out.dtype) * out + x

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        self._check_input(x)
        return self.attend(x)

    def _plain_projection(self) -> tuple[Tensor, Tensor] | None:
        """`qkv`'s weight (2C' + C, C) and bias; None where it is no matter of these alone, and has to be called.

        Pruning and weight_norm make the weight in a hook of each call, adapters put a module of theirs in its place.
        """
        qkv = self.qkv
        hooks = (qkv._forward_pre_hooks, qkv._forward_hooks, qkv._backward_pre_hooks, qkv._backward_hooks)
        # Not by the bound method's function, which torch.compile sees as another one.
        convolves = type(qkv).forward is CONVOLUTIONS[self.spatial_dims].forward
        if not convolves or "forward" in qkv.__dict__ or any(map(len, hooks)) or qkv.bias is None:
            return None
        ones = (1,) * self.spatial_dims
        if (qkv.kernel_size, qkv.stride, qkv.padding, qkv.groups) != (ones, ones, (0,) * len(ones), 1):
            return None
        return qkv.weight.flatten(1), qkv.bias

    def extra_repr(self) -> str:
        text = f"channels={self.channels}, key_channels={self.key_channels}, spatial_dims={self.spatial_dims}"
        return f"{text}, recompute={self.recompute}" if self.recompute else text


class RCCA(CrissCrossAttention):
    """Recurrent criss-cross attention: one `CrissCrossAttention` applied R times with shared weights.

    In 2D every position has seen every other after R=2, in 3D after R=3 (TPAMI, Sec. 3.3 and 3.5).
    """

    def __init__(
        self,
        channels: int,
        recurrence: int = 2,
        spatial_dims: int = 2,
        *,
        reduction: int = 8,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        """
        Args:
            channels: C, of input and output.
            recurrence: R, the number of loops, at least 1.
            spatial_dims: 2 or 3 (or 1).
            reduction: C' = channels / reduction.
            backend: see `ccnet_d2.ops.criss_cross_attention`.
            recompute: as in `CrissCrossAttention`.

        Raises:
            ValueError: recurrence is below 1, or as in `CrissCrossAttention`.
        """
        super().__init__(
            channels, reduction=reduction, spatial_dims=spatial_dims, backend=backend, recompute=recompute
        )
        check_recurrence(recurrence)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        self._check_input(x)
        return self._recur(x)

    def _recur(self, x: Tensor) -> Tensor:
        """The loops. The maps between them are channels-last, as attention reads and writes them."""
        if self._recomputes(x):
            return self._recomputed(x, loops=self.recurrence)
        chosen = x.is_contiguous()
        for loop in range(1, self.recurrence + 1):
            x = self.attend(x, channels_last=loop < self.recurrence if chosen else None)
        return x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recurrence={self.recurrence}"
