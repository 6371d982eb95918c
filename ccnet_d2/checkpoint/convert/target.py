"""What a model needs, found from the weights themselves or taken from a model."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ccnet_d2.checkpoint.safe_load import CheckpointError
from ccnet_d2.modeling import CCNet, CCNetHead, build_resnet, resnet_output_shape

_DEPTHS: dict[tuple[int, ...], int] = {
    (2, 2, 2, 2, False): 18,
    (3, 4, 6, 3, False): 34,
    (3, 4, 6, 3, True): 50,
    (3, 4, 23, 3, True): 101,
    (3, 8, 36, 3, True): 152,
}
_COUNTER = "num_batches_tracked"  # of batch norm, which computes without it


def resnet_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `build_resnet` for weights of a backbone, named as in this package.

    Raises:
        CheckpointError: they are no ResNet that can be built here.
    """
    blocks = []
    for stage in ("res2", "res3", "res4", "res5"):
        found = {
            int(match[1]) for name in weights if (match := re.match(rf"backbone\.{stage}\.(\d+)\.", name))
        }
        if found != set(range(len(found))):
            raise CheckpointError(f"The weights of {stage} are not whole: there are blocks {sorted(found)}.")
        blocks.append(len(found))
    bottleneck = "backbone.res2.0.conv3.weight" in weights
    depth = _DEPTHS.get((*blocks, bottleneck))
    if depth is None:
        raise CheckpointError(
            f"The weights are no ResNet of {', '.join(map(str, _DEPTHS.values()))}: stages of "
            f"{', '.join(map(str, blocks))} {'bottleneck' if bottleneck else 'basic'} blocks."
        )
    if "backbone.stem.conv3.weight" not in weights:
        return {"depth": depth, "stem": "basic"}
    convolutions = [weights.get(f"backbone.stem.conv{i}.weight") for i in (1, 2, 3)]
    return {
        "depth": depth,
        "stem": "deep",
        "stem_channels": tuple(64 if conv is None else conv.shape[0] for conv in convolutions),
    }


def describe(weights: Mapping[str, Tensor]) -> str:
    """What network the weights are, in words."""
    backbone = resnet_arguments(weights)
    channels = backbone.get("stem_channels")
    stem = f"deep stem {'/'.join(map(str, channels))}" if channels else "basic stem"
    text = f"ResNet-{backbone['depth']}, {stem}"
    classifier = weights.get("sem_seg_head.classifier.weight")
    return text if classifier is None else f"CCNet of {classifier.shape[0]} classes on {text}"


def model_of(weights: Mapping[str, Tensor]) -> nn.Module:
    """A model on the meta device with the parameters that weights of this kind have: a CCNet, or a backbone alone
    under the name `backbone`.

    Raises:
        CheckpointError: they are of no network that can be built here.
    """
    arguments = resnet_arguments(weights)
    with torch.device("meta"):
        backbone = build_resnet(**arguments, norm="BN")
        classifier = weights.get("sem_seg_head.classifier.weight")
        if classifier is None:
            return nn.ModuleDict({"backbone": backbone})
        auxiliary = weights.get("sem_seg_head.auxiliary.0.weight")
        try:
            head = CCNetHead(
                resnet_output_shape(arguments["depth"]),
                num_classes=classifier.shape[0],
                channels=classifier.shape[1],
                norm="BN",
                aux_feature=None if auxiliary is None else "res4",
                aux_channels=1 if auxiliary is None else auxiliary.shape[0],
            )
        except ValueError as error:  # of a number of channels that no attention has
            reason = str(error).partition(":")[0]
            raise CheckpointError(
                f"The classifier has shape {tuple(classifier.shape)}, before which there can be no attention: {reason}."
            ) from error
        return CCNet(backbone=backbone, sem_seg_head=head, pixel_mean=[0.0], pixel_std=[1.0])


def shapes_of(model: nn.Module, *, backbone_only: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of what a model has to be given: its parameters and buffers, without counters of batches."""
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.endswith(_COUNTER) and (name.startswith("backbone.") or not backbone_only)
    }
