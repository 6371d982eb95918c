"""Where the first value of a training step that is not finite comes from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """Where the first value that is not finite was found.

    Attributes:
        where: "input", "parameter", "buffer", "output" of a module, "gradient" of a module's output, "gradient" of a
            parameter, or "nowhere".
        name: of the input's image, the parameter or the module; "" for the model itself.
        detail: a phrase for a message.
    """

    where: str
    name: str
    detail: str


_NOWHERE = Finding("nowhere", "", "everything is finite when the step is repeated")


def find(
    model: nn.Module,
    data: Any,
    forward: Callable[[], Mapping[str, Tensor]],
    any_process: Callable[[bool], bool] = bool,
) -> Finding:
    """Where a training step first gives a value that is not finite: forward, then backward.

    Args:
        model: in training mode; its gradients are replaced.
        data: the batch.
        forward: gives the losses of the batch.
        any_process: whether a flag is set in any of the processes, which all call this together, for a model that
            synchronises them in its forward and backward pass.
    """
    found = _find_before(model, data)
    with torch.enable_grad(), _watched(model, found):
        losses = forward()
        bad = [name for name, value in losses.items() if not all_finite(value)]
        if bad and not found:
            found.append(Finding("output", "", f"all modules give finite values, but not the loss {bad[0]}"))
        if any_process(bool(found)):
            return found[0] if found else _NOWHERE
        model.zero_grad(set_to_none=True)
        sum(losses.values()).backward()  # type: ignore[union-attr]
    if found:
        return found[0]
    # From the end of the network, where the gradient comes from.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not all_finite(parameter.grad):
            return Finding(
                "gradient",
                name,
                f"the gradient of {name} is not finite, while those of all modules' outputs are",
            )
    return _NOWHERE


def _find_before(model: nn.Module, data: Any) -> list[Finding]:
    """What is not finite before anything is computed; none or one."""
    for record in data if isinstance(data, list) else [data]:
        if not all_finite(record):
            return [
                Finding("input", ", ".join(image_names([record])), "what the model is given is not finite")
            ]
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in named:
            if not all_finite(value):
                return [Finding(kind, name, f"the {kind} {name} was not finite before")]
    return []


@contextmanager
def _watched(model: nn.Module, found: list[Finding]) -> Iterator[None]:
    """Appends to `found` the first module, in the order of execution, whose output or its gradient is not finite."""
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def on_output(module: nn.Module, inputs: Any, output: Any) -> None:
            label = f"{name or 'the model'} ({type(module).__name__})"
            if not found and not all_finite(output):
                found.append(
                    Finding("output", name, f"the first module with an output that is not finite is {label}")
                )

            def on_gradient(gradient: Tensor) -> None:
                if not found and not all_finite(gradient):
                    found.append(
                        Finding(
                            "gradient",
                            name,
                            f"going backward, the first gradient that is not finite is that of the output of {label}",
                        )
                    )

            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(on_gradient)

        return on_output

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_look_finite(model: nn.Module) -> Tensor:
    """Whether the L2 norms of all gradients are finite: a flag on their device, which is not waited for.

    It is not set either for gradients beyond 1e19, whose squares overflow: see `gradients_are_finite`.
    """
    gradients = _gradients(model)
    if not gradients:
        return torch.tensor(True)
    return torch.isfinite(torch.stack(torch._foreach_norm(gradients, 2))).all()


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether every gradient is."""
    return bool(gradients_look_finite(model)) or all_finite(_gradients(model))


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def all_finite(value: Any) -> bool:
    """Whether all floating point tensors in a nest of dicts, lists and Detectron2 structures are finite."""
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


def image_names(data: Iterable[Any]) -> list[str]:
    """File names in a batch; those of all frames of a clip."""
    names = []
    for record in data:
        if not isinstance(record, Mapping):
            continue
        frames = record.get("frames") if isinstance(record.get("frames"), list) else [record]
        names += [str(f["file_name"]) for f in frames if isinstance(f, Mapping) and "file_name" in f]
    return names


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "get_fields"):  # Instances
        yield from _tensors(value.get_fields())
    elif isinstance(getattr(value, "tensor", None), Tensor):  # Boxes, BitMasks, ImageList
        yield value.tensor
