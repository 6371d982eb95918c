"""The criss-cross attention op. Needs torch alone.

Shapes: B batch, C channels, C' query/key channels, S = (W,), (H, W) or (T, H, W) spatial sizes.
"""

from .backends import BACKENDS, available_backends
from .criss_cross import criss_cross_attention
from .reference import criss_cross_weights

__all__ = ["BACKENDS", "available_backends", "criss_cross_attention", "criss_cross_weights"]
