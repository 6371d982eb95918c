"""How differently two pixels are classified, for all pairs of pixels (RANet, Eq. 2).

Shapes: B batch, N pixels, K classes.
"""

from typing import Any

import torch
from torch import Tensor

# Values of all classes worked on in one go; a GPU gets more, for fewer launches.
_CHUNK = 1 << 22
_TIMES_ON_GPU = 8
_LOWEST, _HIGHEST = 0.001, 0.99  # the released code's bounds of a probability


def jensen_shannon(probability: Tensor) -> Tensor:
    """E_ij, the Jensen-Shannon divergence between the class probabilities of all pairs of pixels.

    E_ij = sum_n (C_in log C_in + C_jn log C_jn) / 2 - U_ijn log U_ijn with U = (C_i + C_j) / 2, that is the entropy
    of the mean less the mean of the entropies. The paper's Eq. 2 is garbled in print (it divides by U instead of
    subtracting); its text names this divergence. Logarithms are to base 2, which puts it into [0, 1] as the paper
    demands. 0 log 0 is 0; in the backward pass a probability counts as at least 1e-12, where the slope is infinite.

    No table of all classes is held: rows are worked on in chunks, and the backward pass computes them again.

    :paper:`RANet`, Sec. 3.1, Eq. 2.

    Args:
        probability: (B, N, K), each pixel's summing to 1.

    Returns:
        (B, N, N), symmetric, zero on the diagonal.
    """
    table: Tensor = _JensenShannon.apply(probability)
    return table


def binary_jensen_shannon(probability: Tensor) -> Tensor:
    """E_ij as the released code has it: of the one class that pixel i most probably is, against all others.

    The divergence between (p, 1 - p) and (q, 1 - q) with p and q the probabilities that i and j have for that class,
    each clamped to [0.001, 0.99], in natural logarithms (so that it ends at log 2 = 0.69). Not symmetric. The class
    is chosen without a gradient. (The code's hand-written gradient has an error of sign; this one is the true one.)

    Args:
        probability: (B, N, K).

    Returns:
        (B, N, N).
    """
    batch, pixels, classes = probability.shape
    own = probability.detach().argmax(dim=2)
    chosen = own[:, :, None].expand(-1, -1, pixels)
    q = probability.transpose(1, 2).expand(batch, classes, pixels).gather(1, chosen)
    p = probability.gather(2, own[:, :, None])
    p, q = p.clamp(_LOWEST, _HIGHEST), q.clamp(_LOWEST, _HIGHEST)
    return _binary_entropy((p + q) / 2) - (_binary_entropy(p) + _binary_entropy(q)) / 2


def _binary_entropy(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


class _JensenShannon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probability: Tensor) -> Tensor:
        probability = probability.detach()
        batch, pixels, _ = probability.shape
        out = probability.new_empty(batch, pixels, pixels)
        negative = _xlog2x(probability) / 2  # half the entropy, less its sign
        for rows in _rows(probability):
            # The table is symmetric: from the diagonal on to the right is enough.
            right = slice(rows.start, pixels)
            mean = (probability[:, rows, None] + probability[:, None, right]).div_(2)
            part = (negative[:, rows, None] + negative[:, None, right] - _xlog2x(mean)).clamp_(0, 1)
            out[:, rows, right] = part
            out[:, right, rows] = part.transpose(1, 2)
        ctx.save_for_backward(probability)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (probability,) = ctx.saved_tensors
        out = torch.empty_like(probability)
        logarithm = probability.clamp(min=1e-12).log2_()
        for rows in _rows(probability):
            # dE_ij / dC_in = log2(C_in / U_ijn) / 2, and E is symmetric.
            both = grad[:, rows] + grad[:, :, rows].transpose(1, 2)
            mean = (probability[:, rows, None] + probability[:, None]).div_(2).clamp_(min=1e-12).log2_()
            from_mean = torch.matmul(both[:, :, None], mean).squeeze(2)
            out[:, rows] = (logarithm[:, rows] * both.sum(2, keepdim=True) - from_mean) / 2
        return out


def _rows(probability: Tensor) -> list[slice]:
    batch, pixels, classes = probability.shape
    values = _CHUNK * (1 if probability.device.type == "cpu" else _TIMES_ON_GPU)
    size = max(1, values // max(1, batch * pixels * classes))
    return [slice(start, min(start + size, pixels)) for start in range(0, pixels, size)]


def _xlog2x(x: Tensor) -> Tensor:
    """Sum of x log2 x over the last axis; 0 log 0 is 0."""
    return torch.linalg.vecdot(x, x.clamp(min=torch.finfo(x.dtype).tiny).log2_())
