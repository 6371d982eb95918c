"""Training batches as plain data, which can be stored and loaded without running code."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes

_KIND = "__kind__"
_OF_ONE_TENSOR = {kind.__name__: kind for kind in (Boxes, RotatedBoxes, BitMasks, Keypoints)}


def to_plain(value: Any) -> Any:
    """A batch as dicts, lists, numbers, strings and CPU tensors.

    Detectron2's `Instances`, `Boxes`, `RotatedBoxes`, `BitMasks`, `PolygonMasks` and `Keypoints` are described; of any
    other object the name of its type stays, and `from_plain` gives that string in its place.
    """
    if isinstance(value, np.generic):  # before float, of which numpy's is one
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return {_KIND: "ndarray", "value": torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Instances):
        fields = {name: to_plain(item) for name, item in value.get_fields().items()}
        return {_KIND: "Instances", "size": list(value.image_size), "fields": fields}
    if type(value) in _OF_ONE_TENSOR.values():
        return {_KIND: type(value).__name__, "value": value.tensor.detach().cpu().clone()}
    if isinstance(value, PolygonMasks):
        return {_KIND: "PolygonMasks", "value": to_plain(value.polygons)}
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def from_plain(value: Any) -> Any:
    """The batch that `to_plain` described."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_plain(item) for key, item in value.items()}
    if kind == "Instances":
        return Instances(tuple(value["size"]), **{k: from_plain(v) for k, v in value["fields"].items()})
    if kind == "ndarray":
        return value["value"].numpy()
    if kind == "PolygonMasks":
        return PolygonMasks(from_plain(value["value"]))
    return _OF_ONE_TENSOR[kind](value["value"])
