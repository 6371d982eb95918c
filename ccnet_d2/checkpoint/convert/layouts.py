"""The names that other code bases give to the same weights.

A layout is a table of patterns for whole names. `layer1` … `layer4` are `res2` … `res5` before the patterns are tried.
Query, key and value get names of their own first; `conversion` joins them.

Sources: state dicts as built by networks/ccnet.py of speedinghzl/CCNet (branches master, pure-python, pytorch-1.1 and
pytorch-1.5, whose names are the same, and the first commits, which say conv1a and conv1b), by mmsegmentation's
ResNetV1c, CCHead and FCNHead, by torchvision's and timm's ResNet.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ccnet_d2.checkpoint.safe_load import CheckpointError

_STAGE = re.compile(r"\blayer([1-4])\.")
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

_BLOCKS = {
    r"(res\d\.\d+)\.conv(\d)\.weight": r"backbone.\1.conv\2.weight",
    rf"(res\d\.\d+)\.bn(\d)\.{_NORM}": r"backbone.\1.conv\2.norm.\3",
    r"(res\d\.\d+)\.downsample\.0\.weight": r"backbone.\1.shortcut.weight",
    rf"(res\d\.\d+)\.downsample\.1\.{_NORM}": r"backbone.\1.shortcut.norm.\2",
}
_BASIC_STEM = {
    r"conv1\.weight": r"backbone.stem.conv1.weight",
    rf"bn1\.{_NORM}": r"backbone.stem.conv1.norm.\1",
}
_OFFICIAL_STEM = {
    r"conv([123])\.weight": r"backbone.stem.conv\1.weight",
    rf"bn([123])\.{_NORM}": r"backbone.stem.conv\1.norm.\2",
}
_MMSEG_STEM = {
    rf"stem\.{conv}\.weight": rf"backbone.stem.conv{i}.weight" for i, conv in enumerate((0, 3, 6), start=1)
} | {
    rf"stem\.{norm}\.{_NORM}": rf"backbone.stem.conv{i}.norm.\1" for i, norm in enumerate((1, 4, 7), start=1)
}
_TIMM_STEM = {
    r"conv1\.0\.weight": r"backbone.stem.conv1.weight",
    rf"conv1\.1\.{_NORM}": r"backbone.stem.conv1.norm.\1",
    r"conv1\.3\.weight": r"backbone.stem.conv2.weight",
    rf"conv1\.4\.{_NORM}": r"backbone.stem.conv2.norm.\1",
    r"conv1\.6\.weight": r"backbone.stem.conv3.weight",
    rf"bn1\.{_NORM}": r"backbone.stem.conv3.norm.\1",
}
_IMAGENET_CLASSIFIER = {r"fc\.(weight|bias)": "the ImageNet classifier"}


@dataclass(frozen=True)
class Layout:
    """How one code base names its weights.

    Attributes:
        name: as `--from` takes it.
        renames: patterns of whole names, and what becomes of them.
        unused: patterns of names that no model here needs, and what they are.
        backbone_prefix: before the names of the backbone, tried with and without.
        hint: what the source computes that no weight tells, and where configs here say so.
    """

    name: str
    renames: dict[str, str]
    unused: dict[str, str] = field(default_factory=dict)
    backbone_prefix: str = ""
    hint: str = ""

    def target(self, key: str) -> str | None:
        """The name in this package of a source's weight; None where there is none."""
        return self._match(key, self.renames)

    def reason_unused(self, key: str) -> str | None:
        """What a weight is that is left out on purpose; None for any other."""
        return self._match(key, self.unused)

    def _match(self, key: str, table: dict[str, str]) -> str | None:
        key = _STAGE.sub(lambda match: f"res{int(match[1]) + 1}.", key)
        for candidate in (key, key.removeprefix(self.backbone_prefix)):
            for pattern, replacement in table.items():
                match = re.fullmatch(pattern, candidate)
                if match:
                    return match.expand(replacement)
        return None


_HEAD = "sem_seg_head."

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "official",
            _OFFICIAL_STEM
            | _BLOCKS
            | {
                r"head\.conv1?([ab])\.0\.weight": _HEAD + r"conv\1.weight",
                rf"head\.conv1?([ab])\.1\.{_NORM}": _HEAD + r"conv\1.norm.\2",
                r"head\.cca\.(query|key|value)_conv\.(weight|bias)": _HEAD + r"context.\1.\2",
                r"head\.cca\.gamma": _HEAD + "context.gamma",
                r"head\.bottleneck\.0\.weight": _HEAD + "fuse.weight",
                rf"head\.bottleneck\.1\.{_NORM}": _HEAD + r"fuse.norm.\1",
                r"head\.bottleneck\.3\.(weight|bias)": _HEAD + r"classifier.\1",
                r"dsn\.0\.(weight|bias)": _HEAD + r"auxiliary.0.\1",
                rf"dsn\.1\.{_NORM}": _HEAD + r"auxiliary.0.norm.\1",
                r"dsn\.3\.(weight|bias)": _HEAD + r"auxiliary.2.\1",
            },
            _IMAGENET_CLASSIFIER | {r"criterion\..*": "the loss"},
            hint="BGR images less the mean 104.007, 116.669, 122.679, undivided; leaky ReLU in the head; "
            "align_corners and ceil_mode: configs/common/models/ccnet_official.py",
        ),
        Layout(
            "mmseg",
            _MMSEG_STEM
            | _BASIC_STEM
            | _BLOCKS
            | {
                r"decode_head\.convs\.0\.conv\.weight": _HEAD + "conva.weight",
                rf"decode_head\.convs\.0\.bn\.{_NORM}": _HEAD + r"conva.norm.\1",
                r"decode_head\.convs\.1\.conv\.weight": _HEAD + "convb.weight",
                rf"decode_head\.convs\.1\.bn\.{_NORM}": _HEAD + r"convb.norm.\1",
                r"decode_head\.cca\.(query|key|value)_conv\.(weight|bias)": _HEAD + r"context.\1.\2",
                r"decode_head\.cca\.gamma\.scale": _HEAD + "context.gamma",
                r"decode_head\.conv_cat\.conv\.weight": _HEAD + "fuse.weight",
                rf"decode_head\.conv_cat\.bn\.{_NORM}": _HEAD + r"fuse.norm.\1",
                r"decode_head\.conv_seg\.(weight|bias)": _HEAD + r"classifier.\1",
                r"auxiliary_head\.convs\.0\.conv\.weight": _HEAD + "auxiliary.0.weight",
                rf"auxiliary_head\.convs\.0\.bn\.{_NORM}": _HEAD + r"auxiliary.0.norm.\1",
                r"auxiliary_head\.conv_seg\.(weight|bias)": _HEAD + r"auxiliary.2.\1",
            },
            _IMAGENET_CLASSIFIER
            | {
                r"head\.fc\.(weight|bias)": "the ImageNet classifier",
                r"data_preprocessor\..*": "mean and deviation of images, which configs say here",
            },
            backbone_prefix="backbone.",
            hint="RGB images; the first block of a dilated stage keeps the dilation before it; align_corners is "
            "False, and True in the runs on 769x769: configs/common/models/ccnet_mmseg.py",
        ),
        Layout(
            "torchvision",
            _BASIC_STEM | _BLOCKS,
            _IMAGENET_CLASSIFIER,
            hint="RGB images; model.backbone.stem=basic .stem_channels=null .ceil_mode=False",
        ),
        Layout(
            "timm",
            _TIMM_STEM | _BLOCKS,
            _IMAGENET_CLASSIFIER,
            hint="RGB images; model.backbone.stem_channels as said above, model.backbone.ceil_mode=False",
        ),
    )
}


def detect_layout(names: Iterable[str]) -> Layout:
    """The layout of a state dict, found by its names.

    Raises:
        CheckpointError: the names are of no layout known here.
    """
    names = set(names)

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any_starts("decode_head.", "backbone.layer1.", "backbone.stem.0.", "stem.0."):
        return LAYOUTS["mmseg"]
    if any_starts("head.cca.", "head.conva.", "head.conv1a.") or "conv3.weight" in names:
        return LAYOUTS["official"]
    if "conv1.0.weight" in names:
        return LAYOUTS["timm"]
    if "conv1.weight" in names and any_starts("layer1."):
        return LAYOUTS["torchvision"]
    if any_starts("backbone.res2.", "res2."):
        raise CheckpointError("The weights have Detectron2's names already: load them as they are.")
    examples = ", ".join(sorted(names)[:3])
    raise CheckpointError(
        f"The layout of the weights is none of {', '.join(LAYOUTS)} (there are {examples} …): "
        "convert a CCNet or a ResNet of one of these."
    )
