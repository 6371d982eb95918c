"""Losses and gradients that are not finite: where they come from, and a file that shows it again."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ccnet_d2.autocast import autocast
from ccnet_d2.checkpoint import CheckpointError, atomic_write, load_file
from ccnet_d2.data.randomness import GeneratorStates
from ccnet_d2.errors import UserError

from .distributed import any_process, own_model
from .plain_batch import from_plain, to_plain

logger = logging.getLogger(__name__)

FOLDER = "non_finite"
"""Where in the output directory the files are."""

_FORMAT = 1


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient became infinite or NaN."""


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


class NonFiniteGuard:
    """Explains losses and gradients that are not finite, and tries other batches if asked to.

    Args:
        output_dir: what reproduces them goes to non_finite/ there; None to write nothing.
        retries: how many batches of the whole run may be dropped for it.

    Attributes:
        dropped: how many were.
    """

    def __init__(self, output_dir: str | None = None, retries: int = 0) -> None:
        if retries < 0:
            raise UserError(f"train.non_finite_retries={retries} is negative.")
        self.output_dir = output_dir
        self.retries = retries
        self.dropped = 0
        self._buffers: list[Tensor] = []

    def remember_buffers(self, model: nn.Module) -> None:
        """Before a step: copy the model's buffers, such as running means, which a step with NaN spoils."""
        now = list(model.buffers())
        if not self._buffers:
            self._buffers = [buffer.detach().clone() for buffer in now]
        else:
            _copy(now, self._buffers)

    def _put_buffers_back(self, model: nn.Module) -> None:
        if self._buffers:
            _copy(self._buffers, list(model.buffers()))

    def handle(
        self,
        trainer: Any,
        data: list[Any],
        losses: Mapping[str, Tensor],
        random: GeneratorStates,
    ) -> None:
        """Report a step whose losses or gradients are not finite; returns, with the model as it was before the step,
        if the batch is to be dropped.

        In all processes at once, as they may have to take part in the forward pass.

        Args:
            trainer: has `iter`, `model` and `forward`.
            data: the batch.
            losses: of the step.
            random: the generators before the step.

        Raises:
            NonFiniteError: the batch is not to be dropped.
        """
        after = GeneratorStates.capture(cuda=random.cuda is not None)
        model = own_model(trainer.model)
        self._put_buffers_back(model)
        random.restore()
        finding = find(model, data, lambda: trainer.forward(data, model), any_process)
        after.restore()
        model.zero_grad(set_to_none=True)
        self._put_buffers_back(model)
        values = {name: float(value.detach()) for name, value in losses.items()}
        message = _message(trainer.iter, values, data, finding)
        if self.output_dir is not None and finding.where != "nowhere":
            path = (
                Path(self.output_dir, FOLDER)
                / f"iteration_{trainer.iter:07d}_process_{comm.get_rank()}_batch_{self.dropped}.pth"
            )
            self._store(path, trainer, model, data, values, finding, random)
            message += f"; {path} reproduces it (tools/replay_non_finite.py)"
        messages = [text for text, found in comm.all_gather((message, finding.where != "nowhere")) if found]
        message = " ".join(f"{text}." for text in messages or [message])
        if self.dropped >= self.retries:
            raise NonFiniteError(message)
        self.dropped += 1
        logger.warning(
            "%s Batch dropped (%d of train.non_finite_retries=%d).", message, self.dropped, self.retries
        )

    def _store(
        self,
        path: Path,
        trainer: Any,
        model: nn.Module,
        data: list[Any],
        losses: dict[str, float],
        finding: Finding,
        random: GeneratorStates,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = trainer.amp_dtype
        with atomic_write(path) as file:
            torch.save(
                {
                    "format": _FORMAT,
                    "iteration": trainer.iter,
                    "losses": losses,
                    "finding": asdict(finding),
                    "images": image_names(data),
                    "amp_dtype": str(dtype).removeprefix("torch.") if dtype else None,
                    "random": random.as_data(),
                    "model": model.state_dict(),
                    "batch": to_plain(data),
                },
                file,
            )


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """In few calls of the device: tensors of one dtype go together."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        pair = by_dtype.setdefault(target.dtype, ([], []))
        pair[0].append(source)
        pair[1].append(target)
    for some_sources, some_targets in by_dtype.values():
        torch._foreach_copy_(some_targets, some_sources)


@dataclass(frozen=True)
class StoredStep:
    """A step as `NonFiniteGuard` stores it."""

    iteration: int
    losses: dict[str, float]
    finding: Finding
    images: list[str]
    amp_dtype: str | None
    random: GeneratorStates
    model: dict[str, Tensor]
    batch: list[Any]


def load_step(path: str | Path) -> StoredStep:
    """Read a file that `NonFiniteGuard` wrote.

    Raises:
        CheckpointError: it is no such file, or damaged.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist: name a file of {FOLDER}/ in an output directory.")
    data = load_file(path)
    if not isinstance(data, dict) or data.get("format") != _FORMAT or "batch" not in data:
        raise CheckpointError(f"{path} is not a file of {FOLDER}/ in an output directory.")
    fields = {key: value for key, value in data.items() if key != "format"}
    fields["finding"] = Finding(**data["finding"])
    fields["random"] = GeneratorStates.from_data(data["random"])
    fields["batch"] = from_plain(data["batch"])
    return StoredStep(**fields)


def replay(model: nn.Module, step: StoredStep) -> Finding:
    """Run a stored step again, on the device of `model`, whose weights are replaced.

    Returns:
        What is found this time.
    """
    model.load_state_dict(step.model)
    model.train()
    device_type = next(model.parameters()).device.type
    dtype = getattr(torch, step.amp_dtype) if step.amp_dtype else None
    random = step.random
    if device_type == "cpu":
        random = GeneratorStates(random.python, random.numpy, random.cpu)
    random.restore()

    def forward() -> Mapping[str, Tensor]:
        with autocast(device_type, dtype):
            return model(step.batch)

    return find(model, step.batch, forward)


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


def _message(iteration: int, losses: dict[str, float], data: list[Any], finding: Finding) -> str:
    values = ", ".join(f"{name}={value:g}" for name, value in losses.items())
    images = ", ".join(image_names(data)) or "without names"
    return (
        f"Loss or gradient not finite at iteration {iteration} ({values}; images: {images}): {finding.detail}"
    )
