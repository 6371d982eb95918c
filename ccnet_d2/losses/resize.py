"""Bringing predictions to the size of labels, and labels to the size of features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear (B, K, h, w) -> (B, K, *size); unchanged where it has that size."""
    # While torch exports or compiles, sizes are symbols, and comparing them would bind the graph to the answer.
    if not torch.compiler.is_compiling() and tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def sample_labels(target: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Nearest labels (B, H, W) -> (B, *size), in integers throughout.

    With align_corners, output i reads input i (H - 1) / (h - 1) rounded half up: the centres of a network's
    features on inputs of side 8 n + 1, exactly. Without, it reads the pixel in the middle of the output's
    cell.
    """
    rows = _nearest(target.shape[-2], size[0], align_corners, target.device)
    columns = _nearest(target.shape[-1], size[1], align_corners, target.device)
    return target[..., rows[:, None], columns[None, :]]


def _nearest(length: int, out_length: int, align_corners: bool, device: torch.device) -> Tensor:
    out = torch.arange(out_length, device=device)
    if not align_corners:
        return (2 * out + 1) * length // (2 * out_length)
    steps = max(out_length - 1, 1)
    return (2 * out * (length - 1) + steps) // (2 * steps)
