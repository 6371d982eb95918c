"""Renaming published weights, and the little arithmetic that goes with it."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ccnet_d2.checkpoint.safe_load import CheckpointError
from ccnet_d2.wording import listed

from .layouts import LAYOUTS, Layout, detect_layout
from .report import Conversion
from .source import read_weights
from .target import describe, model_of, shapes_of
from .write import write_checkpoint

# InPlaceABN, in every version of its kernels, scales by |weight| + eps.
_INPLACE_ABN_EPS = 1e-5
_QKV = ("query", "key", "value")
_HEAD = "sem_seg_head."
_CLASSIFIER = "sem_seg_head.classifier.weight"
_OPTIONAL = "sem_seg_head.auxiliary."  # not needed to predict


def convert_weights(
    source: Mapping[str, Tensor], layout: str = "auto", *, model: nn.Module | None = None
) -> Conversion:
    """Weights of another code base under this package's names.

    What is more than renaming: the 1x1 convolutions of query, key and value become one; `gamma` gets one axis; a bias
    in front of a batch norm (official auxiliary head) goes into its running mean; the norms of the official networks,
    InPlaceABN, scale by |weight| + 1e-5, which becomes the weight. ImageNet weights in the official layout have
    ordinary norms and keep theirs.

    Args:
        source: tensors by name, as from `read_weights`.
        layout: a key of `LAYOUTS`, or "auto" to go by the names.
        model: what the weights are meant for; a model made to their own measures unless given.

    Returns:
        The weights, with an account of every name.

    Raises:
        CheckpointError: the layout is unknown or another one, a name in the network is unknown, a weight has another
            shape than the model's or no floating-point numbers, or one that prediction needs is missing.
    """
    rules = _layout(source, layout)
    sources, unused = _rename(source, rules)
    weights = {name: source[names[0]].clone() for name, names in sources.items()}
    _check_axes(weights, sources)
    changes = [
        *_join_qkv(weights, sources),
        *_fold_biases(weights, sources),
        *_take_inplace_abn_scale(weights, rules),
    ]
    backbone_only = not any(name.startswith(_HEAD) and not name.startswith(_OPTIONAL) for name in weights)
    if not backbone_only and _CLASSIFIER not in weights:
        raise CheckpointError("The weights are not whole: the head has no classifier.")
    expected = shapes_of(model or model_of(weights), backbone_only=backbone_only)
    for name in [
        name for name in weights if name not in expected and not name.endswith("num_batches_tracked")
    ]:
        unused |= dict.fromkeys(sources.pop(name), "the model has no place for it")
        del weights[name]
    _check_shapes(weights, sources, expected)
    missing = tuple(name for name in expected if name not in weights)
    needed = [name for name in missing if not name.startswith(_OPTIONAL)]
    if needed:
        raise CheckpointError(
            f"The weights are not whole: {listed(needed, 1)} of the model cannot be made from them."
        )
    network = describe(weights)
    return Conversion(rules.name, network, weights, sources, unused, missing, tuple(changes), rules.hint)


def convert_file(
    source: str | Path,
    target: str | Path,
    layout: str = "auto",
    *,
    model: nn.Module | None = None,
    classifier: bool = True,
    allow_pickle: bool = False,
) -> Conversion:
    """Convert a published checkpoint to one in Detectron2's format, `{"model": …, "__author__": …}`.

    Args:
        source: a file of torch; it is read as data.
        target: a `.pth` file, or a `.pkl` one as in Detectron2's model zoo; written whole or not at all.
        layout, model: see `convert_weights`.
        classifier: keep the last layer of each head, which belongs to the source's classes.
        allow_pickle: see `read_weights`.

    Raises:
        CheckpointError: as in `convert_weights`; or a file cannot be read or written.
        DiskFullError: there is no room for the new one.
    """
    if _are_one_file(source, target):
        raise CheckpointError(f"{target} is the source itself: name another file to write.")
    try:
        conversion = convert_weights(read_weights(source, allow_pickle=allow_pickle), layout, model=model)
    except CheckpointError as error:
        sentence = str(error)
        raise CheckpointError(sentence if str(source) in sentence else f"{source}: {sentence}") from error
    if not classifier:
        conversion = conversion.without_classifier()
    author = f"{Path(source).name}, {conversion.layout} layout, converted by ccnet_d2"
    write_checkpoint(conversion.weights, target, author)
    return conversion


def _are_one_file(source: str | Path, target: str | Path) -> bool:
    try:
        return os.path.samefile(source, target)
    except (OSError, ValueError):  # one is not there or cannot be looked at, which reading and writing report
        return False


def _layout(source: Mapping[str, Tensor], name: str) -> Layout:
    if name != "auto" and name not in LAYOUTS:
        raise CheckpointError(f"Unknown layout {name!r}: use auto, {', '.join(LAYOUTS)}.")
    found = detect_layout(source)
    # A plain ResNet of timm is one of torchvision, name by name.
    if name == "timm" and found.name == "torchvision":
        return replace(found, name="timm")
    if name not in ("auto", found.name):
        raise CheckpointError(f"The weights have the {found.name} layout, not {name}.")
    return found


def _rename(
    source: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Names of the source by names here, and those left out with the reason."""
    sources: dict[str, tuple[str, ...]] = {}
    unused: dict[str, str] = {}
    unknown = []
    for name in source:
        target = layout.target(name)
        reason = layout.reason_unused(name)
        if target is not None:
            if target in sources:
                raise CheckpointError(f"{sources[target][0]} and {name} are both {target}.")
            sources[target] = (name,)
        elif reason is not None:
            unused[name] = reason
        else:
            unknown.append(name)
    if any(re.search(r"downsample\.2\.", name) for name in unknown):
        raise CheckpointError(
            "The ResNet pools in its shortcuts (ResNet-D), which the backbones here do not: "
            "take its variant C (mmsegmentation's v1c, timm's resnet50c) or S."
        )
    if unknown:
        raise CheckpointError(
            f"{listed(unknown, 1)} of the {layout.name} layout means nothing here: the network computes something "
            "that the models of this package do not."
        )
    return sources, unused


def _join_qkv(weights: dict[str, Tensor], sources: dict[str, tuple[str, ...]]) -> list[str]:
    prefix = "sem_seg_head.context."
    for kind in ("weight", "bias"):
        names = [f"{prefix}{part}.{kind}" for part in _QKV]
        absent = [name for name in names if name not in weights]
        if len(absent) == len(names):
            continue
        if absent:
            raise CheckpointError(
                f"The attention is not whole: there is no {absent[0].removeprefix(prefix)}."
            )
        query, key, value = (weights.pop(name) for name in names)
        if query.shape != key.shape or key.shape[1:] != value.shape[1:]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
            raise CheckpointError(
                f"{', '.join(sources[name][0] for name in names)} have shapes {shapes}, which no attention has."
            )
        weights[f"{prefix}qkv.{kind}"] = torch.cat([query, key, value])
        sources[f"{prefix}qkv.{kind}"] = tuple(sources.pop(name)[0] for name in names)
    gamma = weights.get(f"{prefix}gamma")
    if gamma is None:
        return []
    if gamma.dim() == 0:
        weights[f"{prefix}gamma"] = gamma.reshape(1)
    return ["query, key and value joined to qkv"]


def _fold_biases(weights: dict[str, Tensor], sources: dict[str, tuple[str, ...]]) -> list[str]:
    """(x + b - mean) / deviation is (x - (mean - b)) / deviation, so that the convolution needs no bias."""
    changes = []
    for name in [name for name in weights if name.endswith(".bias")]:
        mean = f"{name.removesuffix('bias')}norm.running_mean"
        if mean in weights:
            if weights[name].shape != weights[mean].shape:
                raise CheckpointError(
                    f"{sources[name][0]} has shape {tuple(weights[name].shape)}, and {sources[mean][0]}, which it is "
                    f"taken off, {tuple(weights[mean].shape)}."
                )
            changes.append(f"{sources[name][0]} taken off {sources[mean][0]}")
            weights[mean] = weights[mean] - weights.pop(name)
            sources[mean] += sources.pop(name)
    return changes


def _take_inplace_abn_scale(weights: dict[str, Tensor], layout: Layout) -> list[str]:
    counted = any(name.endswith("num_batches_tracked") for name in weights)  # as ordinary batch norms do
    if layout.name != "official" or counted or _CLASSIFIER not in weights:
        return []
    names = [name for name in weights if name.endswith("norm.weight")]
    for name in names:
        weights[name] = weights[name].abs() + _INPLACE_ABN_EPS
    return [f"weight = |weight| + {_INPLACE_ABN_EPS:g} in {len(names)} norms, as InPlaceABN computes"]


def _check_axes(weights: Mapping[str, Tensor], sources: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse what has the name of a weight and cannot be one, before anything is computed or concluded from it."""
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not value.is_floating_point():
            raise CheckpointError(
                f"{sources[name][0]} is of {value.dtype}, not of floating-point numbers: convert the weights as they "
                "were before quantization."
            )
        convolution = name.endswith(".weight") and not name.endswith("norm.weight")
        axes = {4} if convolution else {0, 1} if name.endswith("gamma") else {1}
        if value.dim() not in axes or value.numel() == 0:
            raise CheckpointError(
                f"{sources[name][0]} has shape {tuple(value.shape)}, which no "
                f"{'weight of a convolution' if convolution else 'vector of a layer'} has."
            )


def _check_shapes(
    weights: Mapping[str, Tensor],
    sources: Mapping[str, tuple[str, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    wrong = [name for name in weights if name in expected and tuple(weights[name].shape) != expected[name]]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{' + '.join(sources[name])} has shape {tuple(weights[name].shape)}, and {name} of the model "
            f"{expected[name]}{more}."
        )
