"""Context modules: layers that map (B, C, *S) to the same shape. Need torch alone."""

from .build import CONTEXT_MODULES, build_context
from .criss_cross import RCCA, CrissCrossAttention

__all__ = ["CONTEXT_MODULES", "RCCA", "CrissCrossAttention", "build_context"]
