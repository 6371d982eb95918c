"""One training step under autocast, on GPU or CPU."""

import time

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from ccnet_d2.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` with autocast on any device and gradient clipping.

    Detectron2's `AMPTrainer` refuses to run without CUDA; processors with bf16 units train a few times faster in
    bf16 than in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: str | None = None,
        clip_grad_norm: float | None = None,
    ) -> None:
        """
        Args:
            model: gives a dict of losses in training.
            data_loader: an iterable of batches.
            optimizer: over the model's parameters.
            amp_dtype: "bfloat16", "float16", or None to train in fp32.
            clip_grad_norm: clip the gradients' total L2 norm to this.

        Raises:
            UserError: amp_dtype is unknown, or is float16 on a CPU.
        """
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        if amp_dtype is not None and amp_dtype not in _DTYPES:
            raise UserError(f"train.amp.dtype={amp_dtype!r} is not 'auto', 'bfloat16' or 'float16'.")
        if amp_dtype == "float16" and self.device_type == "cpu":
            raise UserError("train.amp.dtype=float16 does not train on a CPU: use bfloat16.")
        self.amp_dtype = None if amp_dtype is None else _DTYPES[amp_dtype]
        self.clip_grad_norm = clip_grad_norm
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype == "float16")

    def run_step(self) -> None:
        assert self.model.training, "[Trainer] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            loss_dict = self.model(data)
        losses = sum(loss_dict.values())

        self.optimizer.zero_grad(set_to_none=True)
        self.grad_scaler.scale(losses).backward()
        self._write_metrics(loss_dict, data_time)
        if self.clip_grad_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def auto_amp_dtype(device_type: str) -> str:
    """The half-precision dtype to train in: float16 only where a GPU has no bf16 units."""
    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"
