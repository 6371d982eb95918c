"""The RANet segmentation head: coarse scores and boundaries, regions, their interaction, the fine scores.

Shapes: B batch, C channels, h w feature size, H W image size, K classes.
"""

import math
from collections.abc import Mapping

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.layers import RegionAttention
from ccnet_d2.layers.norm_act import ACTIVATIONS, ConvNormAct, NormLike
from ccnet_d2.layers.precision import at_least_float32
from ccnet_d2.layers.region_construction import VARIANTS
from ccnet_d2.losses import BoundaryLoss, CrossEntropy

from .config import head_arguments
from .context_block import named_context
from .head_ends import check_features, enlarged, weighted
from .norm import head_norm

OUTPUTS = ("fine", "coarse")
REGION = "region"
_FIRST_BOUNDARY = 0.1  # probability of a boundary before any training: about the share that they have


@SEM_SEG_HEADS_REGISTRY.register()
class RANetHead(nn.Module):
    """3x3 reduction to A; boundary map B and semantic maps C; region attention gives O; A and O give the logits.

    :paper:`RANet: Region Attention Network for Semantic Segmentation`, Sec. 3 and 4. Choices that the paper leaves
    open, and what the two variants make of them (those within the region blocks: see
    `ccnet_d2.layers.RegionConstruction` and `RegionAttention`):

    | | "paper" | "code" (as released) |
    | --- | --- | --- |
    | B and C come from | one 1x1 convolution each on A ("A is passed to two separate convolutional layers") | a 3x3 convolution on res4, then likewise |
    | O to logits | A and O concatenated, 3x3, dropout, 1x1 | the same |
    | boundary loss | at the size of B (B is H x W as A is): whether a boundary passes through a cell | B enlarged to the labels' size |
    | a boundary map of the fine features | none | trained as well |
    | weight of the coarse and the boundary loss | 0.4 and 0.2 | 0.4, and 0.2 (fine) and 0.08 (coarse) |

    B has one channel and a sigmoid (two channels and a softmax in the code, which is the same function), and starts
    at 0.1 everywhere, so that a network without training sees one region rather than one for each pixel.
    """  # noqa: E501  a table

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_feature: str = "res5",
        coarse_feature: str | None = "res4",
        channels: int = 512,
        context: str = REGION,
        variant: str = "paper",
        representatives: int = 8,
        threshold: float | None = None,
        samples: int | None = None,
        pair_cells: int = 49 * 49,
        use_boundary: bool = True,
        use_semantic: bool = True,
        kernel: str | None = None,
        small_regions: str | None = None,
        map_gradients: bool | None = None,
        intra: bool = True,
        inter: bool = True,
        normalization: str = "region",
        dropout: float = 0.1,
        norm: NormLike = "SyncBN",
        activation: str = "relu",
        coarse_loss_weight: float = 0.4,
        boundary_loss_weight: float = 0.2,
        boundary_radius: float = 2.0,
        boundary_resolution: str | None = None,
        balanced_boundaries: bool = False,
        ignore_value: int = 255,
        align_corners: bool = False,
        output: str = "fine",
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            input_shape: the backbone's features by name; `channels` and `stride` of each are read.
            num_classes: K.
            in_feature: the feature the head works on.
            coarse_feature: that of B and C, of the variant "code" alone.
            channels: C of A and O.
            context: "region", or the name of another context module in `ccnet_d2.layers.CONTEXT_MODULES` in its
                place, without B (Tab. 1: "none" 77.5, "psp" 79.6, "nl" 80.5); C is trained all the same.
            variant: "paper" or "code".
            representatives: K of Tab. 2, representative pixels of a region.
            threshold, samples, use_boundary, use_semantic, kernel, small_regions, map_gradients: see
                `ccnet_d2.layers.RegionConstruction`; use_semantic=False and use_boundary=False are "boundary map" and
                "semantic map" of Tab. 1.
            pair_cells, intra, inter, normalization: see `ccnet_d2.layers.RegionAttention`.
            dropout: of whole channels before the classifier.
            norm: see `detectron2.layers.get_norm`.
            activation: "relu" or "leaky_relu".
            coarse_loss_weight: factor of the cross entropy of C.
            boundary_loss_weight: factor of the boundary loss.
            boundary_radius, boundary_resolution, balanced_boundaries: see `ccnet_d2.losses.BoundaryLoss`; a resolution
                of None is the variant's.
            ignore_value: label that carries no loss.
            align_corners: of every upsampling of logits.
            output: what is predicted: "fine", or "coarse" for the logits of C (Tab. 4).
            loss_weight: factor of all losses of this head, for models that have others beside it.

        Raises:
            ValueError: a feature, context, activation, variant or output is unknown.
        """
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        coarse_feature = coarse_feature if variant == "code" else None
        check_features(input_shape, [in_feature] if coarse_feature is None else [in_feature, coarse_feature])
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("output", output, OUTPUTS)
        self.in_feature = in_feature
        self.coarse_feature = coarse_feature
        self.stride = input_shape[in_feature].stride
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.loss_weight = loss_weight
        self.output = output
        self.coarse_loss_weight = coarse_loss_weight
        self.boundary_loss_weight = boundary_loss_weight
        norm = head_norm(self, norm)

        def convolution(in_channels: int) -> ConvNormAct:
            return ConvNormAct(in_channels, channels, 3, norm=norm, activation=activation)

        self.reduce = convolution(input_shape[in_feature].channels)
        self.coarse_reduce = None
        if coarse_feature is not None:
            self.coarse_reduce = nn.Sequential(
                convolution(input_shape[coarse_feature].channels), nn.Dropout2d(dropout)
            )
        self.semantic = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.with_regions = context == REGION
        if self.with_regions:
            self.boundary = _boundary_classifier(channels)
            self.fine_boundary = _boundary_classifier(channels) if variant == "code" else None
            self.context: nn.Module = RegionAttention(
                channels,
                variant=variant,
                representatives=representatives,
                threshold=threshold,
                samples=samples,
                pair_cells=pair_cells,
                use_boundary=use_boundary,
                use_semantic=use_semantic,
                kernel=kernel,
                small_regions=small_regions,
                map_gradients=map_gradients,
                intra=intra,
                inter=inter,
                normalization=normalization,
                norm=norm,
                activation=activation,
            )
            self.boundary_loss = BoundaryLoss(
                radius=boundary_radius,
                resolution=boundary_resolution or ("map" if variant == "paper" else "labels"),
                balanced=balanced_boundaries,
                ignore_index=ignore_value,
                align_corners=align_corners,
            )
        else:
            self.context = named_context(
                context,
                channels,
                channels,
                norm=norm,
                activation=activation,
                align_corners=align_corners,
                others=(REGION,),
            )
        self.fuse = convolution(2 * channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.ignore_value = ignore_value  # read by Detectron2's SemanticSegmentor
        self.loss = CrossEntropy(ignore_index=ignore_value, align_corners=align_corners)

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments, ranet = head_arguments(cfg, input_shape), cfg.MODEL.RANET
        return {
            **arguments,
            "in_feature": cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES[-1],
            "coarse_feature": ranet.COARSE_FEATURE or None,
            "context": ranet.CONTEXT,
            "variant": ranet.VARIANT,
            "representatives": ranet.REPRESENTATIVES,
            "pair_cells": ranet.PAIR_CELLS,
            "coarse_loss_weight": ranet.COARSE_LOSS_WEIGHT,
            "boundary_loss_weight": ranet.BOUNDARY_LOSS_WEIGHT,
            "boundary_radius": ranet.BOUNDARY_RADIUS,
            "output": ranet.OUTPUT,
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
        x = self.reduce(features[self.in_feature])
        coarse_x = x if self.coarse_reduce is None else self.coarse_reduce(features[self.coarse_feature])
        coarse = self.semantic(coarse_x)
        if not self.training and self.output == "coarse":
            return self._enlarged(coarse, image_size), {}
        boundary = self.boundary(coarse_x) if self.with_regions else None
        fused = self._fuse(x, boundary, coarse)
        logits = self.classifier(self.dropout(fused))
        if not self.training:
            return self._enlarged(logits, image_size), {}

        assert targets is not None, "training needs targets"
        losses = {
            "loss_sem_seg": self.loss(logits, targets),
            "loss_sem_seg_coarse": self.coarse_loss_weight * self.loss(coarse, targets),
        }
        if boundary is not None:
            weight = self.boundary_loss_weight
            if self.fine_boundary is not None:
                fine = self.boundary_loss(self.fine_boundary(fused), targets)
                losses["loss_boundary_fine"] = weight * fine
                weight *= self.coarse_loss_weight
            losses["loss_boundary"] = weight * self.boundary_loss(boundary, targets)
        return None, weighted(losses, self.loss_weight)

    def _fuse(self, x: Tensor, boundary: Tensor | None, coarse: Tensor) -> Tensor:
        """A (B, C, h, w), boundary logits (B, 1, h, w) and coarse logits (B, K, h, w) -> (B, C, h, w)."""
        if boundary is None:
            context = self.context(x)
        else:
            scores, classes = at_least_float32(boundary), at_least_float32(coarse)
            context = self.context(x, scores[:, 0].sigmoid(), classes.softmax(1))
        fused: Tensor = self.fuse(torch.cat([x, context], dim=1))
        return fused

    def _enlarged(self, logits: Tensor, image_size: tuple[int, int] | None) -> Tensor:
        return enlarged(logits, image_size, stride=self.stride, align_corners=self.align_corners)


def _boundary_classifier(channels: int) -> nn.Conv2d:
    classifier = nn.Conv2d(channels, 1, kernel_size=1)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.constant_(classifier.bias, math.log(_FIRST_BOUNDARY / (1 - _FIRST_BOUNDARY)))
    return classifier
