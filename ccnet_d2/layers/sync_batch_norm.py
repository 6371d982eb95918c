"""Batch normalisation over all processes on CPUs.

Shapes: B batch, C channels, any number of spatial axes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .precision import at_least_float32

__all__ = ["CPUSyncBatchNorm", "sync_batch_norm_on_cpu"]


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm`, which trains on GPUs alone, for CPUs.

    Statistics are those of all samples of all processes, whatever their number and size on each; they are taken in
    two steps, mean and then squared deviations, in at least fp32. Outputs and gradients are those of one process with
    the whole batch; a second derivative is refused. All processes must call it, in the same order.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …) -> the same shape and dtype.

        Raises:
            ValueError: not one value per channel for each of two samples in all processes together.
        """
        self._check_input_dim(input)
        if not self._several_processes():
            return super().forward(input)
        output, mean, variance, count = _Normalize.apply(
            input, self.weight, self.bias, self.eps, self.process_group
        )
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._update_running_statistics(mean, variance, count)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes (B, C, …), got {tuple(input.shape)}.")

    def _several_processes(self) -> bool:
        if not self.training or not dist.is_available() or not dist.is_initialized():
            return False
        return dist.get_world_size(self.process_group) > 1

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased.to(self.running_var), share)


def sync_batch_norm_on_cpu(model: nn.Module) -> nn.Module:
    """Turn the `torch.nn.SyncBatchNorm` layers of a model into `CPUSyncBatchNorm`; parameters and hooks stay.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            # Not a new layer: whatever holds this one, or a parameter of it, goes on holding the right one.
            module.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
    return model


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias with mean and variance over all processes."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = at_least_float32(input)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        # A count above 2^24 is not exact in fp32.
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)
        dist.all_reduce(count, group=group)
        if count < 2:
            raise ValueError(
                "Batch normalisation needs more than one value per channel in training, counted over all processes; "
                f"got an input of {tuple(input.shape)}."
            )
        mean = x.sum(axes)
        dist.all_reduce(mean, group=group)
        mean /= float(count)
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = x - mean.view(shape)
        variance = centred.square().sum(axes)
        dist.all_reduce(variance, group=group)
        variance /= float(count)
        scale = torch.rsqrt(variance + eps)
        normalized = centred.mul_(scale.view(shape))
        output = normalized
        if weight is not None and bias is not None:
            output = normalized * weight.to(x.dtype).view(shape) + bias.to(x.dtype).view(shape)
        ctx.save_for_backward(normalized, scale, weight)
        ctx.count, ctx.axes, ctx.shape, ctx.group = float(count), axes, shape, group
        ctx.input_dtype = input.dtype
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, gradient: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        normalized, scale, weight = ctx.saved_tensors
        gradient = gradient.to(normalized.dtype)
        # Weight and bias: this process's part; DistributedDataParallel brings the parts together.
        sums = torch.stack([gradient.sum(ctx.axes), (gradient * normalized).sum(ctx.axes)])
        bias_gradient = weight_gradient = None
        if weight is not None:
            bias_gradient, weight_gradient = (part.to(weight.dtype) for part in sums.clone())
        dist.all_reduce(sums, group=ctx.group)
        mean, projection = (sums / ctx.count).unbind()
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        inner = gradient - mean.view(ctx.shape) - normalized * projection.view(ctx.shape)
        input_gradient = (inner * factor.view(ctx.shape)).to(ctx.input_dtype)
        return input_gradient, weight_gradient, bias_gradient, None, None
