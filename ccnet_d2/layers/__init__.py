"""Context modules: layers that map (B, C, *S) to the same shape. Need torch alone."""

from .aspp import ASPP
from .asymmetric_non_local import AsymmetricNonLocal
from .build import CONTEXT_MODULES, build_context
from .context_module import ContextModule, NoContext
from .criss_cross import RCCA, CrissCrossAttention
from .danet import DANet
from .gcn import GlobalConvolution
from .hv_attention import HV, HVAndVH
from .non_local import NonLocal
from .psanet import PSANet
from .psp import PSP

__all__ = [
    "ASPP",
    "CONTEXT_MODULES",
    "HV",
    "PSP",
    "RCCA",
    "AsymmetricNonLocal",
    "ContextModule",
    "CrissCrossAttention",
    "DANet",
    "GlobalConvolution",
    "HVAndVH",
    "NoContext",
    "NonLocal",
    "PSANet",
    "build_context",
]
