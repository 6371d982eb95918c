"""A trained segmentation model as one function from images to logits, in operators that every runtime has.

Shapes: B batch, C channels, H W image size, K classes.
"""

from __future__ import annotations

import copy
import functools
import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from ccnet_d2.errors import UserError
from ccnet_d2.layers import ClipRCCA, CrissCrossAttention, RegionConstruction

__all__ = ["ExportError", "ExportedNetwork", "check_form"]


class ExportError(UserError):
    """A model cannot be exported, or the exported file does not compute what the model computes."""


class ExportedNetwork(nn.Module):
    """What the file holds: normalisation, network and enlargement of the logits to the images' size.

    The model given is copied, in fp32 on the CPU, and is not changed. In the copy criss-cross attention is computed
    by the reference implementation, which is written in plain tensor operations: the file then needs neither this
    package nor its compiled operator, and all sizes in it follow from those of the input.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a network of this project's form: `backbone`, `sem_seg_head`, `pixel_mean` and `pixel_std`.

        Raises:
            ExportError: it is of another form.
        """
        super().__init__()
        check_form(model)
        model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        self.backbone = model.backbone
        self.sem_seg_head = model.sem_seg_head
        # Buffers of this module, so that they are in the file's state; the model keeps them out of its own.
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)
        self.divisor = max(getattr(model, "size_divisibility", 0), self.backbone.size_divisibility, 1)
        for module in self.modules():
            if isinstance(module, CrissCrossAttention):
                module.backend = "reference"
                # As a convolution and not as the matrix product that suits the compiled operator's memory layout:
                # runtimes fuse convolutions, and the product is chosen by looking at the batch size.
                vars(module)["project"] = functools.partial(_project, module)

    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: (B, 3, H, W), float, 0-255, channels in the model's `input_format`.

        Returns:
            (B, K, H, W) logits, fp32.
        """
        x = (images - self.pixel_mean) / self.pixel_std
        if self.divisor == 1:
            return self.sem_seg_head(self.backbone(x), None, (x.shape[-2], x.shape[-1]))[0]
        below, right = -x.shape[-2] % self.divisor, -x.shape[-1] % self.divisor
        x = F.pad(x, (0, right, 0, below))
        logits, _ = self.sem_seg_head(self.backbone(x), None, (x.shape[-2], x.shape[-1]))
        # Cut off what was added; a slice would ask whether there was anything, which depends on the size.
        return F.pad(logits, (0, -right, 0, -below))


def _project(attention: CrissCrossAttention, x: Tensor, *_: object) -> tuple[Tensor, ...]:
    """`CrissCrossAttention.project` as a convolution, with the weight that it has."""
    sizes = [attention.key_channels, attention.key_channels, attention.channels]
    return attention.qkv(x).split(sizes, dim=1)


def check_form(model: nn.Module) -> None:
    """Whether a model is one that `ExportedNetwork` takes.

    Raises:
        ExportError: it is not; says why.
    """
    name = type(model).__name__
    if hasattr(model, "roi_heads") or hasattr(model, "proposal_generator"):
        raise ExportError(
            f"{name} does not export: detection networks (Mask R-CNN with or without RCCA) return as many boxes as "
            "they find, and only semantic segmentation networks are written to ONNX or torch.export files here."
        )
    if any(isinstance(module, ClipRCCA) for module in model.modules()):
        raise ExportError(
            f"{name} does not export: it segments clips, and only networks on single images do."
        )
    if any(isinstance(module, RegionConstruction) for module in model.modules()):
        raise ExportError(
            f"{name} with RANet's head does not export: it reads the lines between all pairs of cells, and how many "
            "and how long they are is worked out anew for each image's size."
        )
    missing = [
        part for part in ("backbone", "sem_seg_head", "pixel_mean", "pixel_std") if not hasattr(model, part)
    ]
    if missing:
        raise ExportError(
            f"{name} does not export: it has no {' and no '.join(missing)}, as the segmentation networks of "
            "ccnet_d2.modeling have."
        )
    head = model.sem_seg_head
    try:
        inspect.signature(head.forward).bind("features", None, "size")
    except TypeError:
        raise ExportError(
            f"{name} with {type(head).__name__} does not export: its head takes other arguments (features, targets, "
            "size) than those of the segmentation networks of ccnet_d2.modeling."
        ) from None
