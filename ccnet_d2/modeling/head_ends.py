"""The two ends that the segmentation heads have alike: the features they ask for, the logits and losses they give."""

from collections.abc import Iterable, Mapping

from detectron2.layers import ShapeSpec
from torch import Tensor

from ccnet_d2.losses.resize import upsample


def check_features(input_shape: Mapping[str, ShapeSpec], features: Iterable[str]) -> None:
    """
    Args:
        input_shape: the backbone's features by name.
        features: those that the head works on.

    Raises:
        ValueError: the backbone does not have one of them.
    """
    for feature in features:
        if feature not in input_shape:
            raise ValueError(f"Feature {feature!r} is not among the backbone's {sorted(input_shape)}.")


def enlarged(
    logits: Tensor, image_size: tuple[int, int] | None, *, stride: int, align_corners: bool
) -> Tensor:
    """A head's answer in inference: logits (B, K, h, w) -> (B, K, H, W), in fp32.

    Args:
        logits: of the classes.
        image_size: (H, W); the logits' size times the stride unless given.
        stride: of the logits.
        align_corners: of the enlargement.
    """
    if image_size is None:
        image_size = (logits.shape[-2] * stride, logits.shape[-1] * stride)
    return upsample(logits.float(), image_size, align_corners)


def weighted(losses: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """A head's losses, each times the weight that the head has beside others, as in PanopticFPN."""
    return {name: weight * loss for name, loss in losses.items()}
