"""Context modules: layers that map (B, C, *S) to the same shape. Need torch alone."""

from .aspp import ASPP
from .asymmetric_non_local import AsymmetricNonLocal
from .build import CONTEXT_MODULES, build_context
from .clip_rcca import ClipRCCA, clips_of
from .context_module import ContextModule, NoContext
from .criss_cross import RCCA, CrissCrossAttention
from .danet import DANet
from .gcn import GlobalConvolution
from .hv_attention import HV, HVAndVH
from .non_local import NonLocal
from .psanet import PSANet
from .psp import PSP
from .region_attention import RegionAttention
from .region_construction import RegionConstruction, Regions

__all__ = [
    "ASPP",
    "CONTEXT_MODULES",
    "HV",
    "PSP",
    "RCCA",
    "AsymmetricNonLocal",
    "ClipRCCA",
    "ContextModule",
    "CrissCrossAttention",
    "DANet",
    "GlobalConvolution",
    "HVAndVH",
    "NoContext",
    "NonLocal",
    "PSANet",
    "RegionAttention",
    "RegionConstruction",
    "Regions",
    "build_context",
    "clips_of",
]
