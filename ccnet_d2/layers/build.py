"""Context modules by name, so that a run chooses its module with one override."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .aspp import ASPP
from .asymmetric_non_local import AsymmetricNonLocal
from .clip_rcca import ClipRCCA
from .context_module import NoContext
from .criss_cross import RCCA
from .danet import DANet
from .gcn import GlobalConvolution
from .hv_attention import HV, HVAndVH
from .non_local import NonLocal
from .norm_act import ActivationLike, NormLike
from .psanet import PSANet
from .psp import PSP

CONTEXT_MODULES: dict[str, Callable[..., nn.Module]] = {
    "none": NoContext,
    "rcca": RCCA,
    "rcca3d": ClipRCCA,
    "nl": NonLocal,
    "hv": HV,
    "hv_vh": HVAndVH,
    "gcn": GlobalConvolution,
    "psp": PSP,
    "aspp": ASPP,
    "asymmetric_nl": AsymmetricNonLocal,
    "danet": DANet,
    "psanet": PSANet,
}
"""The modules of the papers' tables. A module of one's own joins by `CONTEXT_MODULES["mine"] = MyModule`."""


def build_context(
    name: str,
    in_channels: int,
    channels: int,
    *,
    norm: NormLike = "BN",
    activation: ActivationLike = "relu",
    align_corners: bool = False,
    **options: Any,
) -> nn.Module:
    """A context module for a head that works on `channels` behind a backbone map of `in_channels`.

    A standalone module is built for in_channels -> channels, any other for channels -> channels; tell them
    apart by the result's `standalone` (absent: False).

    Args:
        name: a key of `CONTEXT_MODULES`.
        in_channels: channels of the backbone's map, for instance 2048.
        channels: channels the head works on, for instance 512.
        norm: the head's norm, for the modules that have one.
        activation: the head's activation, for the modules that have one.
        align_corners: the head's, for the modules that resize.
        options: further constructor arguments, for instance recurrence=2.

    Raises:
        ValueError: the name, or an option of that module, is unknown.
    """
    if name not in CONTEXT_MODULES:
        raise ValueError(f"unknown context module {name!r}: use one of {', '.join(CONTEXT_MODULES)}.")
    module = CONTEXT_MODULES[name]
    parameters = inspect.signature(module).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [] if open_ended else [option for option in options if option not in parameters]
    if unknown:
        known = ", ".join(key for key in parameters if key not in ("channels", "out_channels"))
        raise ValueError(f"context module {name!r} has no option {unknown[0]!r}: it takes {known}.")
    shared = {"norm": norm, "activation": activation, "align_corners": align_corners}
    arguments = {key: value for key, value in shared.items() if key in parameters} | options
    if getattr(module, "standalone", False):
        return module(in_channels, out_channels=channels, **arguments)
    return module(channels, **arguments)
