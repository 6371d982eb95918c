"""One training step under autocast, on GPU or CPU."""

import errno
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ccnet_d2.autocast import autocast
from ccnet_d2.data.randomness import GeneratorStates
from ccnet_d2.data.train_loader import TrainLoader
from ccnet_d2.errors import UserError

from .non_finite import NonFiniteGuard
from .non_finite_search import gradients_are_finite, gradients_look_finite
from .void_labels import VoidLabels

logger = logging.getLogger(__name__)

_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)\.|exited unexpectedly)"
)


class Trainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` with autocast on any device, gradient clipping, and all of its state saved.

    Detectron2's `AMPTrainer` refuses to run without CUDA; processors with bf16 units train a few times faster in
    bf16 than in fp32.

    What steps draw from the global random generators is a stream of its own, which goes on at each step where the
    last one ended: evaluations and other hooks that draw in between change nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        clip_grad_norm: float | None = None,
        guard: NonFiniteGuard | None = None,
    ) -> None:
        """
        Args:
            model: gives a dict of losses in training.
            data_loader: an iterable of batches; its place is saved if it has a `state_dict`.
            optimizer: over the model's parameters.
            amp_dtype: torch.bfloat16, torch.float16, or None to train in fp32.
            clip_grad_norm: clip the gradients' total L2 norm to this.
            guard: looks into losses and gradients that are not finite; default: one that writes nothing.
        """
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        self.amp_dtype = amp_dtype
        self.clip_grad_norm = clip_grad_norm
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype == torch.float16)
        self.guard = guard or NonFiniteGuard()
        self._void_labels = VoidLabels()
        self._random: GeneratorStates | None = None
        self._process_states: list[dict[str, Any]] | None = None

    def train(self, start_iter: int, max_iter: int) -> None:
        """The loop of Detectron2's `TrainerBase.train`, without a traceback for what is no fault of the program."""
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage, _dead_workers_reported():
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1
            except UserError:
                raise
            except Exception as error:
                if _dead_worker(error) is None and getattr(error, "errno", None) != errno.ENOSPC:
                    logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()
                if isinstance(self.data_loader, TrainLoader):
                    self.data_loader.close()

    def run_step(self) -> None:
        assert self.model.training, "[Trainer] model was changed to eval mode!"
        if self._random is not None:
            self._random.restore()
        while not self._try_step():
            pass
        self._random = self._capture_random()

    def _try_step(self) -> bool:
        """One step on the next batch; False, with nothing changed, if a loss or gradient is not finite and another
        batch may be tried.

        Raises:
            NonFiniteError: one is not finite and no other batch may be tried.
            UserError: the loader has no more batches.
        """
        start = time.perf_counter()
        try:
            data = next(self._data_loader_iter)
        except StopIteration as end:
            raise UserError(
                f"dataloader.train has no batch for iteration {self.iter}: it, or its sampler, has to go on without "
                "end, as Detectron2's TrainingSampler and RepeatFactorTrainingSampler do."
            ) from end
        data_time = time.perf_counter() - start
        self._void_labels.look(data)
        random = self._capture_random()
        self.guard.remember_buffers(self.model)

        loss_dict = self.forward(data)
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(loss_dict.values())
        self.grad_scaler.scale(total).backward()
        finite, values = self._outcome(total, loss_dict)
        if not finite:
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.handle(self, data, loss_dict, random)
            return False

        self._write_metrics(values, data_time)
        if self.clip_grad_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return True

    def forward(self, data: list[Any], model: nn.Module | None = None) -> dict[str, Tensor]:
        """The losses of a batch under the run's autocast setting.

        Args:
            data: a batch.
            model: another one than the trainer's, such as the one inside its distributed wrapper.
        """
        with autocast(self.device_type, self.amp_dtype):
            return (model or self.model)(data)

    def state_dict(self) -> dict[str, Any]:
        """Of optimizer, scheduler, scaler, and of each process its random generators and place in the data.

        With several processes, all call `gather_process_states` before.
        """
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["batches_dropped"] = self.guard.dropped
        state["processes"] = self._process_states or [self._process_state()]
        self._process_states = None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the state is of another optimizer.
        """
        configured = [dict(group) for group in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        _compare_settings(self.optimizer, configured)
        if scale := state_dict.get("grad_scaler"):  # empty where the run was not in fp16 before
            self.grad_scaler.load_state_dict(scale)
        self.guard.dropped = state_dict.get("batches_dropped", 0)
        processes = state_dict.get("processes")
        if processes is None:
            logger.warning("The checkpoint does not say where in the data the run was: it starts anew there.")
            return
        same = len(processes) == comm.get_world_size()
        own = processes[comm.get_rank() if same else 0]
        if same:
            self._random = GeneratorStates.from_data(own["random"])
        if own["data"] is not None and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(own["data"])

    def gather_process_states(self) -> None:
        """Bring what only each process knows to the main one, for the next `state_dict`; in all processes."""
        if comm.get_world_size() > 1:
            self._process_states = comm.gather(self._process_state()) or None

    def _process_state(self) -> dict[str, Any]:
        loader = self.data_loader
        return {
            "random": (self._random or self._capture_random()).as_data(),
            "data": loader.state_dict() if hasattr(loader, "state_dict") else None,
        }

    def _capture_random(self) -> GeneratorStates:
        return GeneratorStates.capture(cuda=self.device_type == "cuda")

    def _outcome(self, total: Tensor, losses: dict[str, Tensor]) -> tuple[bool, dict[str, Tensor]]:
        """Whether losses and gradients are finite in all processes, and the losses as CPU tensors.

        A GPU is waited for once, when the backward pass is in its queue: each wait leaves it idle until it is given
        work again. All processes have the same, averaged gradients; a scaler leaves out steps with infinite ones and
        lowers its scale.
        """
        scaled = self.grad_scaler.is_enabled()
        finite = torch.isfinite(total.detach())
        fine = finite if scaled else finite & gradients_look_finite(self.model)
        results = [self._in_all_processes(fine), *losses.values()]
        flag, *values = torch.stack([r.detach().to(total).reshape(()) for r in results]).cpu()
        if not flag:  # rarely; gradients may still turn out to be finite
            fine = finite & (scaled or gradients_are_finite(self.model))
            flag = self._in_all_processes(fine)
        return bool(flag), dict(zip(losses, values, strict=True))

    def _in_all_processes(self, flag: Tensor) -> Tensor:
        if comm.get_world_size() == 1:
            return flag
        shared = flag.to(torch.int32)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return shared


def _compare_settings(optimizer: torch.optim.Optimizer, configured: list[dict[str, Any]]) -> None:
    """Tell what differs between an optimizer that has loaded its state, settings included, and the config."""
    for group in optimizer.param_groups:
        lacking = sorted(optimizer.defaults.keys() - group.keys())
        if lacking:
            raise UserError(
                f"The checkpoint's optimizer is no {type(optimizer).__name__}, as it has no {', '.join(lacking)}: go "
                "on with the optimizer it was saved with, or start a new run with its weights as "
                "train.init_checkpoint."
            )
    differences = {}
    for group, own in zip(optimizer.param_groups, configured, strict=True):
        # A scheduler changes "lr", and keeps what it started from.
        saved = {**group, "lr": group.get("initial_lr", group["lr"])}
        differences.update(
            {key: (own[key], saved[key]) for key in optimizer.defaults if own[key] != saved[key]}
        )
    for key, (own, saved) in differences.items():
        logger.warning(
            "The run goes on with the checkpoint's optimizer.%s=%s, not with %s of the config: a resumed run keeps "
            "its optimizer's settings.",
            key,
            saved,
            own,
        )


@contextmanager
def _dead_workers_reported() -> Iterator[None]:
    """A loader worker that was killed as one sentence; torch raises that wherever the program happens to be."""
    try:
        yield
    except RuntimeError as error:
        dead = _dead_worker(error)
        if dead is None:
            raise
        how = f"was killed by signal: {dead[2]}" if dead[2] else "ended unexpectedly"
        raise UserError(
            f"The loader worker with process number {dead[1]} {how}; most often the machine ran out of memory: try "
            "fewer, with dataloader.train.num_workers=N, and go on from the last checkpoint with --resume."
        ) from error


def _dead_worker(error: BaseException | None) -> re.Match[str] | None:
    """Which worker died according to an error or, where that tells more, the one that it came from."""
    found = None
    while error is not None and (found is None or found[2] is None):
        found = _DEAD_WORKER.search(str(error)) or found
        error = error.__cause__ or error.__context__
    return found
