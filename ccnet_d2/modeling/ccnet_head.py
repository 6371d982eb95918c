"""The CCNet segmentation head: reduction, context module, fusion, classifier; and the auxiliary classifier.

Shapes: B batch, C channels, h w feature size, H W image size, K classes.
"""

from collections.abc import Callable, Mapping

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.layers.norm_act import NormLike
from ccnet_d2.losses import CategoryConsistentLoss, CrossEntropy, OHEMCrossEntropy, SegmentationLoss

from .config import head_arguments
from .context_block import ContextBlock, category_consistent_branch, conv_norm_act
from .head_ends import check_features, enlarged, weighted
from .norm import head_norm

LOSSES: dict[str, Callable[..., SegmentationLoss]] = {"cross_entropy": CrossEntropy, "ohem": OHEMCrossEntropy}


class AuxiliaryHead(nn.Sequential):
    """3x3 convolution, dropout and classifier on an earlier stage: (B, C, h, w) -> (B, K, h, w)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        norm: NormLike,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__(
            conv_norm_act(in_channels, channels, 3, norm, activation),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, num_classes, kernel_size=1),
        )


@SEM_SEG_HEADS_REGISTRY.register()
class CCNetHead(ContextBlock):
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
        norm: NormLike = "SyncBN",
        activation: str = "relu",
        aux_feature: str | None = "res4",
        aux_channels: int = 512,
        aux_loss_weight: float = 0.4,
        loss: SegmentationLoss | str = "cross_entropy",
        category_consistent: CategoryConsistentLoss | str | None = None,
        ignore_value: int = 255,
        align_corners: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            input_shape: the backbone's features by name; `channels` and `stride` of each are read.
            num_classes: K.
            in_feature: the feature the head works on.
            channels: C between `conva` and the classifier.
            context: a module (B, C, h, w) -> (B, C, h, w), or the name of one in `ccnet_d2.layers.CONTEXT_MODULES`,
                where a suffix _r<R> sets the number of loops, and _recompute saves memory: "rcca" (R=2), "rcca_r1",
                "rcca_recompute", "nl", "psp", "none", …
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
            loss_weight: factor of all losses of this head, for models that have others beside it.

        Raises:
            ValueError: a feature, context, loss or activation name is unknown, the auxiliary classifier has no
                channels, or `category_consistent` is asked for with a standalone context module.
        """
        check_features(input_shape, [in_feature] if aux_feature is None else [in_feature, aux_feature])
        if not callable(loss):
            check_choice("loss", loss, LOSSES)
        if aux_feature is not None and aux_channels < 1:
            raise ValueError(
                f"aux_channels={aux_channels} are too few: aux_feature=null (AUX_FEATURE '') leaves the auxiliary "
                "classifier out."
            )
        super().__init__(
            input_shape[in_feature].channels,
            channels,
            context,
            norm=norm,
            activation=activation,
            align_corners=align_corners,
        )
        self.in_feature = in_feature
        self.aux_feature = aux_feature
        self.aux_loss_weight = aux_loss_weight
        self.align_corners = align_corners
        self.loss_weight = loss_weight
        self.stride = input_shape[in_feature].stride
        self.num_classes = num_classes
        self.ignore_value = ignore_value  # read by Detectron2's SemanticSegmentor and PanopticFPN

        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        loss_args = {"ignore_index": ignore_value, "align_corners": align_corners}
        self.loss = LOSSES[loss](**loss_args) if isinstance(loss, str) else loss

        self.category_features, self.category_consistent_loss = category_consistent_branch(
            category_consistent, self, channels, **loss_args
        )

        self.auxiliary = None
        if aux_feature is not None:
            self.auxiliary = AuxiliaryHead(
                input_shape[aux_feature].channels,
                aux_channels,
                num_classes,
                norm=head_norm(self, norm),
                activation=activation,
                dropout=dropout,
            )
            self.aux_loss = CrossEntropy(**loss_args)

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments, ccnet = head_arguments(cfg, input_shape), cfg.MODEL.CCNET
        return {
            **arguments,
            "in_feature": cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES[-1],
            "context": ccnet.CONTEXT,
            "aux_feature": ccnet.AUX_FEATURE or None,
            "aux_channels": ccnet.AUX_CHANNELS,
            "aux_loss_weight": ccnet.AUX_LOSS_WEIGHT,
            "loss": ccnet.LOSS,
            "category_consistent": ccnet.CATEGORY_CONSISTENT or None,
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
            return enlarged(logits, image_size, stride=self.stride, align_corners=self.align_corners), {}
        assert targets is not None, "training needs targets"
        losses = {"loss_sem_seg": self.loss(logits, targets)}
        if self.category_features is not None:
            embedding = self.category_features(context)
            losses["loss_category_consistent"] = self.category_consistent_loss(embedding, targets)
        if self.auxiliary is not None:
            aux_logits = self.auxiliary(features[self.aux_feature])
            losses["loss_sem_seg_aux"] = self.aux_loss_weight * self.aux_loss(aux_logits, targets)
        return None, weighted(losses, self.loss_weight)

    def predict(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) backbone features -> (B, K, h, w) logits."""
        return self._predict(x)[0]

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the context module's output."""
        out, context = super().forward(x)
        return self.classifier(self.dropout(out)), context
