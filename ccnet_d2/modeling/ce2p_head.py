"""The CE2P head of human parsing: context, fine features and edges, with RCCA or any other context module.

Shapes: B batch, C channels, h5 w5 size of res5, h2 w2 size of res2, H W image size, K classes.
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ccnet_d2.layers.norm_act import NormLike
from ccnet_d2.losses import CategoryConsistentLoss, CrossEntropy, EdgeCrossEntropy, edge_labels
from ccnet_d2.losses.resize import upsample

from .config import head_arguments
from .context_block import ContextBlock, category_consistent_branch, conv_norm_act
from .head_ends import check_features, enlarged, weighted
from .norm import head_norm

_EDGE_CLASSES = 2


class Decoder(nn.Module):
    """Context enlarged to the size of res2 and joined with it; parsing 1 is classified here."""

    def __init__(
        self,
        channels: int,
        fine_channels: int,
        num_classes: int,
        *,
        width: int,
        fine_width: int,
        norm: NormLike,
        activation: str,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.reduce = conv_norm_act(channels, width, 1, norm, activation)
        self.fine = conv_norm_act(fine_channels, fine_width, 1, norm, activation)
        self.fuse = nn.Sequential(
            conv_norm_act(width + fine_width, width, 1, norm, activation),
            conv_norm_act(width, width, 1, norm, activation),
        )
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, context: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h5, w5), (B, C2, h2, w2) -> features (B, width, h2, w2), logits (B, K, h2, w2)."""
        size = (fine.shape[-2], fine.shape[-1])
        enlarged = upsample(self.reduce(context), size, self.align_corners)
        features = self.fuse(torch.cat([enlarged, self.fine(fine)], dim=1))
        return features, self.classifier(features)


class EdgeBranch(nn.Module):
    """Edges out of the backbone's earlier stages: one 1x1 convolution a stage, one 3x3 classifier shared by all."""

    def __init__(
        self, in_channels: Sequence[int], *, width: int, norm: NormLike, activation: str, align_corners: bool
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.reduce = nn.ModuleList(conv_norm_act(c, width, 1, norm, activation) for c in in_channels)
        self.shared = nn.Conv2d(width, _EDGE_CLASSES, kernel_size=3, padding=1)
        self.classifier = nn.Conv2d(len(in_channels) * _EDGE_CLASSES, _EDGE_CLASSES, kernel_size=1)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The stages' maps, finest first -> features (B, stages * width, h2, w2), logits (B, 2, h2, w2)."""
        size = (stages[0].shape[-2], stages[0].shape[-1])
        features = [reduce(stage) for reduce, stage in zip(self.reduce, stages, strict=True)]
        logits = [upsample(self.shared(x), size, self.align_corners) for x in features]
        enlarged = [upsample(x, size, self.align_corners) for x in features]
        return torch.cat(enlarged, dim=1), self.classifier(torch.cat(logits, dim=1))


@SEM_SEG_HEADS_REGISTRY.register()
class CE2PHead(nn.Module):
    """Parsing with context embedding and edge perceiving; parsing 2, from both branches, is the answer.

    The losses are cross entropy of parsing 1 and of parsing 2, cross entropy of the edges, balanced and with labels
    made here from the classes' (so after every augmentation), and if asked for the category consistent loss on the
    context module's output; all with weight 1.

    :paper:`Devil in the Details: Towards Accurate Single and Multiple Human Parsing` (CE2P), Fig. 2, whose context
    module is PSP; :paper:`CCNet` (TPAMI), Sec. 4.5, puts RCCA (R=2) there.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int = 20,
        in_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        channels: int = 512,
        context: nn.Module | str = "rcca",
        decoder_channels: int = 256,
        fine_channels: int = 48,
        edge_channels: int = 256,
        dropout: float = 0.1,
        norm: NormLike = "SyncBN",
        activation: str = "leaky_relu",
        category_consistent: CategoryConsistentLoss | str | None = None,
        ignore_value: int = 255,
        align_corners: bool = True,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            input_shape: the backbone's features by name; `channels` and `stride` of each are read.
            num_classes: K.
            in_features: names of the features, finest first: the last feeds the context module, the first the decoder,
                all but the last the edge branch.
            channels: C of the context module.
            context: a module (B, C, h, w) -> (B, C, h, w), or the name of one in `ccnet_d2.layers.CONTEXT_MODULES`,
                with the suffixes of `named_context`: "rcca" (R=2, the paper's), "psp" (CE2P's), "none", …
            decoder_channels: of the decoder's features and of what parsing 2 is classified from.
            fine_channels: that the first feature is reduced to in the decoder.
            edge_channels: that the edge branch reduces each feature to.
            dropout: of whole channels before the classifier of parsing 2.
            norm: see `detectron2.layers.get_norm`.
            activation: "relu", or "leaky_relu" (slope 0.01) as in the official code.
            category_consistent: loss on the context module's output, before `convb`, reduced to 16 channels by a 1x1
                convolution: a `CategoryConsistentLoss`, or its form, "piecewise" or "quadratic", for one with the
                paper's weights; None for none.
            ignore_value: label that carries no loss.
            align_corners: of every enlargement.
            loss_weight: factor of all losses of this head, for models that have others beside it.

        Raises:
            ValueError: a feature, context, loss, norm or activation name is unknown, the norm does not fit the
                channels, fewer than two features are named, or `category_consistent` is asked for with a standalone
                context module.
        """
        super().__init__()
        in_features = tuple(in_features)
        if len(in_features) < 2:
            raise ValueError(
                f"in_features must name two of the backbone's features or more, got {list(in_features)}."
            )
        check_features(input_shape, in_features)
        self.in_features = in_features
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        widths = [input_shape[feature].channels for feature in in_features]
        self.stride = input_shape[in_features[0]].stride

        norm = head_norm(self, norm)
        shared = {"norm": norm, "activation": activation, "align_corners": align_corners}
        self.context = ContextBlock(widths[-1], channels, context, **shared)
        self.decoder = Decoder(
            channels, widths[0], num_classes, width=decoder_channels, fine_width=fine_channels, **shared
        )
        self.edge = EdgeBranch(widths[:-1], width=edge_channels, **shared)
        joined = decoder_channels + edge_channels * len(widths[:-1])
        self.fuse = conv_norm_act(joined, decoder_channels, 1, norm, activation)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(decoder_channels, num_classes, kernel_size=1)

        loss_args = {"ignore_index": ignore_value, "align_corners": align_corners}
        self.parsing_loss = CrossEntropy(**loss_args)
        self.edge_loss = EdgeCrossEntropy(**loss_args)
        self.category_features, self.category_consistent_loss = category_consistent_branch(
            category_consistent, self.context, channels, **loss_args
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments, ccnet = head_arguments(cfg, input_shape), cfg.MODEL.CCNET
        return {
            **arguments,
            "in_features": cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES,
            "context": ccnet.CONTEXT,
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
            image_size: (H, W) to enlarge parsing 2 to in inference; size of the first feature times its stride unless
                given.

        Returns:
            In training None and a dict of scalar losses, in inference (B, K, H, W) logits and an empty dict.
        """
        stages = [features[name] for name in self.in_features]
        block, context = self.context(stages[-1])
        fine, parsing_1 = self.decoder(block, stages[0])
        edge_features, edges = self.edge(stages[:-1])
        joined = self.fuse(torch.cat([fine, edge_features], dim=1))
        parsing_2 = self.classifier(self.dropout(joined))
        if not self.training:
            return enlarged(parsing_2, image_size, stride=self.stride, align_corners=self.align_corners), {}
        assert targets is not None, "training needs targets"
        losses = {
            "loss_parsing_1": self.parsing_loss(parsing_1, targets),
            "loss_parsing_2": self.parsing_loss(parsing_2, targets),
            "loss_edge": self.edge_loss(edges, edge_labels(targets, ignore_index=self.ignore_value)),
        }
        if self.category_features is not None:
            embedding = self.category_features(context)
            losses["loss_category_consistent"] = self.category_consistent_loss(embedding, targets)
        return None, weighted(losses, self.loss_weight)
