"""The CCNet segmentation head: reduction, context module, fusion, classifier; and the auxiliary classifier.

Shapes: B batch, C channels, h w feature size, H W image size, K classes.
"""

import re
from collections.abc import Callable, Mapping

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ccnet_d2.layers.build import build_context
from ccnet_d2.layers.norm_act import ACTIVATIONS
from ccnet_d2.losses import CategoryConsistentLoss, CrossEntropy, OHEMCrossEntropy, SegmentationLoss
from ccnet_d2.losses.category_consistent import FORMS
from ccnet_d2.losses.resize import upsample

LOSSES: dict[str, Callable[..., SegmentationLoss]] = {"cross_entropy": CrossEntropy, "ohem": OHEMCrossEntropy}
CATEGORY_CONSISTENT_CHANNELS = 16  # TPAMI, Sec. 3.4
_RECURRENCE = re.compile(r"(?P<name>.+)_r(?P<recurrence>\d+)")


class AuxiliaryHead(nn.Sequential):
    """3x3 convolution, dropout and classifier on an earlier stage: (B, C, h, w) -> (B, K, h, w)."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, *, norm: str, activation: str, dropout: float
    ) -> None:
        super().__init__(
            _conv(in_channels, channels, 3, norm, activation),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, num_classes, kernel_size=1),
        )


@SEM_SEG_HEADS_REGISTRY.register()
class CCNetHead(nn.Module):
    """`conva` 3x3, context module, `convb` 3x3; concatenated with the backbone's features, fused and classified.

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`, Sec. 3.1 and Fig. 2. The context module
    is any layer that maps (B, C, h, w) to the same shape. A context module that is a head of its own (`standalone`,
    such as PSP) takes the backbone's features directly and its output is classified.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_feature: str = "res5",
        channels: int = 512,
        context: nn.Module | str = "rcca",
        dropout: float = 0.1,
        norm: str = "SyncBN",
        activation: str = "relu",
        aux_feature: str | None = "res4",
        aux_channels: int = 512,
        aux_loss_weight: float = 0.4,
        loss: SegmentationLoss | str = "cross_entropy",
        category_consistent: CategoryConsistentLoss | str | None = None,
        ignore_value: int = 255,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            input_shape: the backbone's features by name; `channels` and `stride` of each are read.
            num_classes: K.
            in_feature: the feature the head works on.
            channels: C between `conva` and the classifier.
            context: a module (B, C, h, w) -> (B, C, h, w), or the name of one in `ccnet_d2.layers.CONTEXT_MODULES`,
                where a suffix _r<R> sets the number of loops: "rcca" (R=2), "rcca_r1", "nl", "psp", "none", …
            dropout: of whole channels before the classifier.
            norm: see `detectron2.layers.get_norm`.
            activation: "relu", or "leaky_relu" (slope 0.01) as in the official code.
            aux_feature: the feature of the auxiliary classifier; None for no auxiliary loss.
            aux_channels: C of the auxiliary classifier.
            aux_loss_weight: factor of the auxiliary loss, which is always plain cross entropy.
            loss: see `ccnet_d2.losses.SegmentationLoss`, or a name in `LOSSES`.
            category_consistent: loss on the context module's output, before `convb`, reduced to 16 channels by a 1x1
                convolution: a `CategoryConsistentLoss`, or its form, "piecewise" or "quadratic", for one with the
                paper's weights; None for none.
            ignore_value: label that carries no loss.
            align_corners: of every upsampling of logits.

        Raises:
            ValueError: a feature, context, loss or activation name is unknown, or `category_consistent` is asked for
                with a standalone context module.
        """
        super().__init__()
        for feature in (in_feature, aux_feature):
            if feature is not None and feature not in input_shape:
                raise ValueError(f"Feature {feature!r} is not among the backbone's {sorted(input_shape)}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not one of {sorted(ACTIVATIONS)}.")
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not one of {sorted(LOSSES)}.")
        if isinstance(category_consistent, str) and category_consistent not in FORMS:
            raise ValueError(
                f"category_consistent={category_consistent!r} is not one of {sorted(FORMS)} or None."
            )
        self.in_feature = in_feature
        self.aux_feature = aux_feature
        self.aux_loss_weight = aux_loss_weight
        self.align_corners = align_corners
        self.stride = input_shape[in_feature].stride
        self.num_classes = num_classes

        in_channels = input_shape[in_feature].channels
        if isinstance(context, str):
            match = _RECURRENCE.fullmatch(context)
            options = {"recurrence": int(match["recurrence"])} if match else {}
            context = build_context(
                match["name"] if match else context,
                in_channels,
                channels,
                norm=lambda c: get_norm(norm, c),
                activation=activation,
                align_corners=align_corners,
                **options,
            )
        self.context = context
        self.standalone = getattr(self.context, "standalone", False)
        if not self.standalone:
            self.conva = _conv(in_channels, channels, 3, norm, activation)
            self.convb = _conv(channels, channels, 3, norm, activation)
            self.fuse = _conv(in_channels + channels, channels, 3, norm, activation)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        loss_args = {"ignore_index": ignore_value, "align_corners": align_corners}
        self.loss = LOSSES[loss](**loss_args) if isinstance(loss, str) else loss

        self.category_features = None
        if category_consistent is not None:
            if self.standalone:
                raise ValueError(
                    f"category_consistent works on the map that goes into convb, which {type(self.context).__name__} "
                    "as a whole head of its own does not have: choose another context, or category_consistent=None."
                )
            self.category_features = nn.Conv2d(channels, CATEGORY_CONSISTENT_CHANNELS, kernel_size=1)
            self.category_consistent_loss = (
                CategoryConsistentLoss(form=category_consistent, **loss_args)
                if isinstance(category_consistent, str)
                else category_consistent
            )

        self.auxiliary = None
        if aux_feature is not None:
            self.auxiliary = AuxiliaryHead(
                input_shape[aux_feature].channels,
                aux_channels,
                num_classes,
                norm=norm,
                activation=activation,
                dropout=dropout,
            )
            self.aux_loss = CrossEntropy(**loss_args)

    @classmethod
    def from_config(cls, cfg, input_shape):
        head, ccnet = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.CCNET
        return {
            "input_shape": input_shape,
            "num_classes": head.NUM_CLASSES,
            "in_feature": head.IN_FEATURES[-1],
            "channels": head.CONVS_DIM,
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
            "context": ccnet.CONTEXT,
            "dropout": ccnet.DROPOUT,
            "activation": ccnet.ACTIVATION,
            "aux_feature": ccnet.AUX_FEATURE or None,
            "aux_channels": ccnet.AUX_CHANNELS,
            "aux_loss_weight": ccnet.AUX_LOSS_WEIGHT,
            "loss": ccnet.LOSS,
            "category_consistent": ccnet.CATEGORY_CONSISTENT or None,
            "align_corners": ccnet.ALIGN_CORNERS,
        }

    def forward(
        self,
        features: Mapping[str, Tensor],
        targets: Tensor | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: the backbone's features by name, (B, C, h, w) each.
            targets: (B, H, W) integer labels; needed in training.
            image_size: (H, W) to upsample logits to in inference; feature size times stride unless given.

        Returns:
            In training None and a dict of scalar losses, in inference (B, K, H, W) logits and an empty dict.
        """
        logits, context = self._predict(features[self.in_feature])
        if not self.training:
            if image_size is None:
                image_size = (logits.shape[-2] * self.stride, logits.shape[-1] * self.stride)
            return upsample(logits.float(), image_size, self.align_corners), {}
        assert targets is not None, "training needs targets"
        losses = {"loss_sem_seg": self.loss(logits, targets)}
        if self.category_features is not None:
            embedding = self.category_features(context)
            losses["loss_category_consistent"] = self.category_consistent_loss(embedding, targets)
        if self.auxiliary is not None:
            aux_logits = self.auxiliary(features[self.aux_feature])
            losses["loss_sem_seg_aux"] = self.aux_loss_weight * self.aux_loss(aux_logits, targets)
        return None, losses

    def predict(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) backbone features -> (B, K, h, w) logits."""
        return self._predict(x)[0]

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the context module's output."""
        if self.standalone:
            out = context = self.context(x)
        else:
            context = self.context(self.conva(x))
            out = self.fuse(torch.cat([x, self.convb(context)], dim=1))
        return self.classifier(self.dropout(out)), context


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, activation: str) -> Conv2d:
    # torch's own initial weights, as in the official code: larger ones learn several times slower behind a norm.
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=ACTIVATIONS[activation](),
    )
