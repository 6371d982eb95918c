"""RCCA, or another context module, inside a model that exists already.

The module becomes a child of the block beside which it runs, and a forward hook of that block calls it. No module is
renamed or replaced, so checkpoints of the plain model fit, `stage[-1]` is still the last block, and `freeze()` treats
the new module as part of its block.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch._dynamo
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ccnet_d2.errors import UserError
from ccnet_d2.layers import RCCA
from ccnet_d2.layers.non_local_block import NonLocalBlock
from ccnet_d2.wording import listed

Model = TypeVar("Model", bound=nn.Module)

INSERTS: dict[str, Callable[..., nn.Module]] = {"rcca": RCCA, "nl": NonLocalBlock}
"""Modules that `add_rcca` knows by name: those of the paper's Mask R-CNN table."""


def add_rcca(
    model: Model,
    where: str = "res4",
    before: int | None = -1,
    recurrence: int | None = None,
    module: nn.Module | str | None = None,
    *,
    channels: int | None = None,
    feature: str | None = None,
    name: str | None = None,
    **options: Any,
) -> Model:
    """Insert RCCA into a model: in the default place of the paper, right before the last block of res4.

    RCCA is the identity until it is trained (gamma starts at 0). The model's state dict gains the keys of the new
    module, for instance `backbone.bottom_up.res4.5.rcca.{qkv.weight,qkv.bias,gamma}`, and keeps all others.

    :paper:`CCNet: Criss-Cross Attention for Semantic Segmentation (TPAMI)`, Sec. 4.6.

    Args:
        model: any module; it is changed in place. Call this before an optimizer or a DDP wrapper is made. Norm layers
            are converted (SyncBN, FrozenBN) before it: that replaces them, with the hook of a module beside one.
        where: dotted path of a module, such as "backbone.bottom_up.res4", or the end of one that only one module
            has, such as "res4" (any Detectron2 ResNet), "s3" (RegNet) or "layer3" (torchvision).
        before: index of the block of `where` before which to insert, negative ones counted from the end; None:
            after `where`, on its output.
        recurrence: R, the number of loops; the module's own unless given: 2 for RCCA, 1 for the non-local block.
        module: what to insert: "rcca" (also None), "nl" (the paper's non-local block), or a module that maps
            (B, C, H, W) to the same shape.
        channels: C of the features there; found out for Detectron2's blocks and backbones, and for blocks that
            begin with a convolution.
        feature: where `where` gives a dict of features, as a backbone does: the one to run on; `before` must be None.
        name: of the new module in its block; "rcca", "nl", or "context" for a module of one's own.
        options: further constructor arguments of the named module, such as reduction=16.

    Returns:
        The same model.

    Raises:
        UserError: there is no such place, or it cannot be told, or an argument does not fit; the model is unchanged.
        ValueError: the module refuses its arguments.
    """
    for key, value, kinds, what in (
        ("where", where, str, "the path of a module, such as 'res4'"),
        ("before", before, int | None, "the index of a block, or None"),
        ("module", module, nn.Module | str | None, f"one of {listed(INSERTS)}, or a module built already"),
        ("name", name, str | None, "a name"),
    ):
        if not isinstance(value, kinds):
            given = f"a {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
            raise UserError(f"{key} must be {what}, not {given}.")
    if isinstance(model, DistributedDataParallel):
        raise UserError(
            "the model is in DistributedDataParallel already, which would not average the new module's gradients: call "
            "add_rcca first, and wrap the model after it."
        )
    path, target = _find(model, where)
    if feature is not None and before is not None:
        raise UserError(
            f"feature={feature!r} is of the output of {path}: before=None belongs to it, not before={before}."
        )
    if before is not None:
        path, target = _block(path, target, before)
        # A child of a Sequential would run by itself.
        while isinstance(target, nn.Sequential) and len(target):
            path, target = _join(path, next(iter(target._modules))), target[0]
    elif feature is None:
        while isinstance(target, nn.Sequential) and len(target):
            path, target = _join(path, list(target._modules)[-1]), target[-1]
    if not _runs(target):
        # Its hooks would never be called, and a list that the model goes through would run the module by itself.
        raise UserError(_container(path, target))

    if module is None:
        module = "rcca"
    name = name or (module if isinstance(module, str) else "context")
    if "." in name:
        raise UserError(f"name={name!r}: a module's name has no dot in it.")
    if hasattr(target, name):
        raise UserError(
            f"{path} has a {name!r} already: give the new module another name, such as name='{name}_2'."
        )
    if isinstance(module, str):
        if channels is None:
            channels = _channels(path, target, after=before is None, feature=feature)
        module = _build(module, channels, recurrence, options)
        # An activation, at the end of a Sequential for instance, has no parameters that tell device and dtype.
        parameters = chain(target.parameters(), model.parameters())
        reference = next((p for p in parameters if p.is_floating_point()), None)
        if reference is not None:
            module.to(reference.device, reference.dtype)
        module.train(target.training)
    elif recurrence is not None or options:
        given = ", ".join(["recurrence"] * (recurrence is not None) + list(options))
        raise UserError(
            f"{given}: arguments for a module chosen by name, but module is a {type(module).__name__} built already."
        )

    _have_compiler_heed_hooks()
    target.add_module(name, module)
    if before is None:
        after = _RunAfter(path, name, feature)
        after.handle = target.register_forward_hook(after)
    else:
        first = _RunBefore(path, name)
        first.handle = target.register_forward_pre_hook(first)
    return model


def _have_compiler_heed_hooks() -> None:
    """Have torch.compile tell a block with a hook from one without: it would run code compiled for the plain model,
    which leaves the module out, for both."""
    if getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False):
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # code compiled before does not tell them apart


class _Hook:
    """What both hooks do when pickle reads a model back, in a process that may not have called `add_rcca`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        _have_compiler_heed_hooks()
        self.__dict__.update(state)


class _RunBefore(_Hook):
    """Forward pre-hook that sends the block's input through one of its children."""

    # Kept with the hook so that a copy of the model read back by pickle in another process reserves the hook's id.
    handle: RemovableHandle

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name

    def __call__(self, block: nn.Module, inputs: tuple) -> tuple:
        x = _tensor(inputs[0] if inputs else None, f"the input of {self.path}")
        return (getattr(block, self.name)(x), *inputs[1:])


class _RunAfter(_Hook):
    """Forward hook that sends the block's output, or one feature of it, through one of its children."""

    handle: RemovableHandle

    def __init__(self, path: str, name: str, feature: str | None) -> None:
        self.path = path
        self.name = name
        self.feature = feature

    def __call__(self, block: nn.Module, inputs: tuple, output: Any) -> Any:
        module = getattr(block, self.name)
        if self.feature is None:
            return module(_tensor(output, f"the output of {self.path}"))
        if not isinstance(output, Mapping):
            raise UserError(
                f"feature={self.feature!r}, but the output of {self.path} is a {type(output).__name__} and no dict."
            )
        if self.feature not in output:
            raise UserError(f"The output of {self.path} has no {self.feature!r}: it has {listed(output)}.")
        x = _tensor(output[self.feature], f"the feature {self.feature!r} of {self.path}")
        return {**output, self.feature: module(x)}


def _tensor(x: Any, what: str) -> Tensor:
    if not isinstance(x, Tensor):
        hint = f"; choose one with feature=, out of {listed(x)}" if isinstance(x, Mapping) else ""
        raise UserError(f"RCCA needs a tensor (B, C, H, W), but {what} is a {type(x).__name__}{hint}.")
    return x


def _find(model: nn.Module, where: str) -> tuple[str, nn.Module]:
    """The full path and the module that `where` means."""
    modules = dict(model.named_modules())
    if where in modules:
        return where or type(model).__name__, modules[where]
    found = [path for path in modules if path.endswith(f".{where}")]
    if len(found) == 1:
        return found[0], modules[found[0]]
    if found:
        raise UserError(f"where={where!r} is ambiguous: {listed(found)}; give the whole path.")
    last_names = {path.rpartition(".")[2]: path for path in reversed(modules) if path}
    near = [last_names[n] for n in difflib.get_close_matches(where.rpartition(".")[2], last_names, n=3)]
    # Of Sequentials, which heads have too, a model with stages of Detectron2's blocks or a backbone of features needs
    # no mention.
    exists = [path for path, module in modules.items() if path and _blocks(module, sequential=False)]
    features = [
        _features(path, module) for path, module in modules.items() if path and isinstance(module, Backbone)
    ]
    if not exists and features:
        exists = near + features
    if not exists:
        exists = [path for path, module in modules.items() if path and _blocks(module)]
    exists = exists or near or [child for child, _ in model.named_children()]
    raise UserError(
        f"{type(model).__name__} has no module {where!r}: it has {listed(exists)}; any path of "
        "model.named_modules() will do."
    )


def _blocks(module: nn.Module, *, sequential: bool = True) -> dict[str, nn.Module]:
    """The children of a stage, which run one after another; empty for a module that is no stage.

    A stage has nothing but Detectron2's blocks, or is a Sequential, unless that is excluded.
    """
    children = dict(module.named_children())
    of_blocks = children and all(isinstance(child, CNNBlockBase) for child in children.values())
    return children if of_blocks or (sequential and type(module) is nn.Sequential) else {}


def _features(path: str, backbone: Backbone) -> str:
    return f"{path} (with before=None and feature= one of {listed(backbone.output_shape())})"


def _runs(module: nn.Module) -> bool:
    """Whether the module has a forward of its own, as ModuleList and ModuleDict do not."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _container(path: str, module: nn.Module) -> str:
    """Why nothing can be inserted beside a module that never runs, and where instead."""
    children = [_join(path, child) for child, _ in module.named_children()]
    instead = (
        f"give one of them, such as where='{children[-1]}', with before=None" if children else "give another"
    )
    return f"{path}, a {type(module).__name__}, only holds other modules and does not run itself: {instead}."


def _block(path: str, stage: nn.Module, before: int) -> tuple[str, nn.Module]:
    blocks = list(_blocks(stage).items())
    if not blocks and not _runs(stage):
        raise UserError(_container(path, stage))
    if not blocks:
        raise UserError(
            f"before={before}, but {path}, a {type(stage).__name__}, is not a sequence of blocks: give a stage, or "
            "before=None to insert after it."
        )
    if not -len(blocks) <= before < len(blocks):
        raise UserError(
            f"before={before}, but {path} has {len(blocks)} blocks: 0 to {len(blocks) - 1}, or -{len(blocks)} to -1."
        )
    child, block = blocks[before]
    return _join(path, child), block


def _channels(path: str, target: nn.Module, *, after: bool, feature: str | None) -> int:
    """C before or after `target`."""
    found = None
    shapes = _shapes(target)
    if feature is not None:
        if shapes:
            if feature not in shapes:
                raise UserError(f"{path} has no feature {feature!r}: it has {listed(shapes)}.")
            found = shapes[feature].channels
    elif after:
        found = getattr(target, "out_channels", None)
        if found is None and shapes:
            raise UserError(
                f"{path} gives a dict of features: choose one with feature=, out of {listed(shapes)}."
            )
    else:
        convolutions = (m.in_channels for m in target.modules() if isinstance(m, nn.Conv2d))
        found = getattr(target, "in_channels", None) or next(convolutions, None)
    if not isinstance(found, int):
        raise UserError(
            f"The number of channels {'after' if after else 'before'} {path}, a {type(target).__name__}, cannot be "
            "told: give it as channels=."
        )
    return found


def _shapes(module: nn.Module) -> Mapping[str, ShapeSpec]:
    """Those of a backbone's features by name; none of other modules, of which Detectron2's heads call the size of
    their one output `output_shape` too."""
    output_shape = getattr(module, "output_shape", None)
    shapes = output_shape() if callable(output_shape) else None
    return shapes if isinstance(shapes, Mapping) else {}


def _build(name: str, channels: int, recurrence: int | None, options: Mapping[str, Any]) -> nn.Module:
    if name not in INSERTS:
        raise UserError(
            f"Unknown module {name!r}: it is one of {listed(INSERTS)}, or a module built already."
        )
    insert = INSERTS[name]
    known = [key for key in inspect.signature(insert).parameters if key not in ("channels", "recurrence")]
    for option in options:
        if option not in known:
            raise UserError(f"The module {name!r} has no option {option!r}: it has {listed(known)}.")
    if recurrence is not None:
        options = {**options, "recurrence": recurrence}
    return insert(channels, **options)


def _join(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child
