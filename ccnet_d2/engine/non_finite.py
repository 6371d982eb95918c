"""A step whose loss or gradient is not finite: explained, and kept as a file that shows it again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ccnet_d2.atomic_file import atomic_write
from ccnet_d2.autocast import autocast
from ccnet_d2.checkpoint import CheckpointError, load_file
from ccnet_d2.data.randomness import GeneratorStates
from ccnet_d2.errors import UserError

from .distributed import any_process, own_model
from .non_finite_search import Finding, find, image_names
from .plain_batch import from_plain, to_plain

logger = logging.getLogger(__name__)

FOLDER = "non_finite"
"""Where in the output directory the files are."""

_FORMAT = 1


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient became infinite or NaN."""


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


def _message(iteration: int, losses: dict[str, float], data: list[Any], finding: Finding) -> str:
    values = ", ".join(f"{name}={value:g}" for name, value in losses.items())
    images = ", ".join(image_names(data)) or "without names"
    return (
        f"Loss or gradient not finite at iteration {iteration} ({values}; images: {images}): {finding.detail}"
    )
