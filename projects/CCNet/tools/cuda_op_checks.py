"""What check_cuda_op.py asks of the kernels of criss-cross attention: each check raises CheckFailed or returns errors.

Shapes: B batch, C channels, C' query/key channels, S spatial sizes, N number of positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from attention_formulations import textbook_attention
from ccnet_d2.ops import compiled, reference
from cuda_op_cases import DTYPES, Case, make_inputs
from official_kernels import OfficialKernels

NAMES = ("out", "grad_query", "grad_key", "grad_value")
# Relative errors in the Frobenius norm that are allowed: times the textbook form's error in the same precision, and in
# fp32 at least this much.
FACTOR = {"out": 2.0, "grad_query": 3.0, "grad_key": 3.0, "grad_value": 3.0}
TOLERANCE = {"out": 1e-5, "grad_query": 3e-5, "grad_key": 3e-5, "grad_value": 3e-5}
# Where the textbook form happens to be exact, a few roundings are still allowed.
HALF_LEAST = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MASK_POSITIONS = 2500  # above, the oracle goes line by line: an N x N mask would not fit
CPU = torch.device("cpu")


class CheckFailed(Exception):
    """A result is wrong; the message says which."""


def poison(case: Case, device: torch.device) -> None:
    """Leave NaN in the memory that the allocator hands out next, for tensors of the sizes that the op allocates."""
    positions = case.batch * torch.Size(case.sizes).numel()
    dtype = DTYPES[case.dtype]
    blocks = []
    for channels in (case.key_channels, case.key_channels, case.channels):
        blocks.append(torch.full((positions * channels,), float("nan"), dtype=dtype, device=device))
    for factor in (1, 1, 2, 4):
        blocks.append(torch.full((positions * factor,), float("nan"), device=device))
    del blocks


def run_kernels(case: Case, inputs: tuple[Tensor, ...], *, poisoned: bool = True) -> dict[str, Tensor]:
    """The operators, called directly. `poisoned`: into memory that holds NaN."""
    query, key, value, grad_out = inputs
    if poisoned:
        poison(case, query.device)
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    if poisoned:
        poison(case, query.device)
    grads = torch.ops.ccnet_d2.criss_cross_backward(grad_out, query, key, value, out, lse)
    if query.is_cuda:
        torch.cuda.synchronize()
    return {"lse": lse, **dict(zip(NAMES, (out, *grads), strict=True))}


def neighbour_mask(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(N, N), true where two positions differ along at most one axis."""
    axes = [torch.arange(size, device=device) for size in sizes]
    places = torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])
    return (places[:, :, None] != places[:, None, :]).sum(0) <= 1


def masked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, with one dense N x N softmax."""
    mask = neighbour_mask(tuple(query.shape[2:]), query.device)
    q, k, v = (x.flatten(2) for x in (query, key, value))
    energy = torch.einsum("bcn,bcm->bnm", q, k).masked_fill(~mask, float("-inf"))
    return torch.einsum("bcm,bnm->bcn", v, energy.softmax(-1)).reshape(value.shape)


def differentiate(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients of a differentiable formulation."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = function(query, key, value)
    grads = torch.autograd.grad(out, (query, key, value), inputs[3])
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def relative_error(got: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """The error's norm over that of `expected`, or over `least` where that is larger."""
    difference = torch.linalg.vector_norm(got.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(least))


def least_norms(case: Case) -> dict[str, float]:
    """Norms below which gradients are what is left after cancellation.

    Where nearly all weight lies on one key, the gradients of query and key are differences of nearly equal numbers,
    each as large as sqrt(C).
    """
    elements = case.batch * torch.Size(case.sizes).numel() * case.key_channels
    logits = (case.logit_scale / case.key_channels**0.5) ** 0.5
    least = 0.03 * logits * (case.channels * elements) ** 0.5
    return {"grad_query": least, "grad_key": least}


def check_case(case: Case, device: torch.device) -> dict[str, float]:
    """Raises CheckFailed, or returns the errors."""
    inputs = make_inputs(case, device)
    got = run_kernels(case, inputs)
    again = run_kernels(case, inputs)
    for name, tensor in got.items():
        if not torch.equal(tensor, again[name]):
            raise CheckFailed(f"{name} differs between two runs")
    return judge(case, inputs, got)


def check_small_case(case: Case, device: torch.device) -> dict[str, float]:
    """The same with one run of the kernels, and everything else on the CPU."""
    got = run_kernels(case, make_inputs(case, device, drawn_on=CPU), poisoned=False)
    return judge(case, make_inputs(case, CPU), {name: tensor.cpu() for name, tensor in got.items()})


def judge(case: Case, inputs: tuple[Tensor, ...], got: dict[str, Tensor]) -> dict[str, float]:
    """Raises CheckFailed where results are wrong, or returns their errors."""
    for name, tensor in got.items():
        if not torch.isfinite(tensor).all():
            raise CheckFailed(f"{name} is not finite")
    positions = torch.Size(case.sizes).numel()
    if case.logit_scale >= 1e4 or case.batch * positions > 50_000:
        return {}  # finite and reproducible is what can be asked: one rounding decides which key is the largest
    oracle = masked_attention if positions <= MASK_POSITIONS else reference.criss_cross_attention
    expected = differentiate(oracle, tuple(x.double() for x in inputs))
    least = least_norms(case)

    def errors_of(results: dict[str, Tensor]) -> dict[str, float]:
        return {name: relative_error(results[name], expected[name], least.get(name, 1e-30)) for name in NAMES}

    errors = errors_of(got)
    plain = errors_of(differentiate(textbook_attention, inputs))
    for name in NAMES:
        floor = TOLERANCE[name] if case.dtype == "float32" else HALF_LEAST[DTYPES[case.dtype]]
        limit = max(FACTOR[name] * plain[name], floor)
        if not errors[name] <= limit:
            raise CheckFailed(f"{name} has a relative error of {errors[name]:.2e}, {limit:.2e} is allowed")
    return errors


def check_official(official: OfficialKernels, device: torch.device) -> dict[str, float]:
    """The official kernels' results by ours, in fp32; raises CheckFailed where they differ."""
    worst = dict.fromkeys(NAMES, 0.0)
    for seed, (batch, sizes) in enumerate([(2, (9, 13)), (1, (33, 40)), (1, (97, 97))]):
        case = Case("float32", batch, sizes, 64, 128, "contiguous", 1.0, seed)
        inputs = make_inputs(case, device)
        ours = differentiate(compiled.criss_cross_attention, inputs)
        theirs = differentiate(official.attention, inputs)
        for name in NAMES:
            error = relative_error(ours[name], theirs[name].double())
            worst[name] = max(worst[name], error)
            if not error <= 2 * TOLERANCE[name]:
                raise CheckFailed(f"{name} differs from the official kernels' by {error:.2e}, {sizes}")
    return worst


def check_large(device: torch.device) -> float:
    """More than 2**31 elements in value and out; a sample of positions against float64. Needs some 30 GB."""
    height, width, key_channels, channels = 2100, 2100, 8, 512
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, height, width)
    query, key = (
        torch.randn((*shape, key_channels), generator=generator, device=device, dtype=dtype).movedim(-1, 1)
        for _ in range(2)
    )
    value = torch.randn((*shape, channels), generator=generator, device=device, dtype=dtype).movedim(-1, 1)
    out, _ = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    draw = random.Random(0)
    worst = 0.0
    for _ in range(64):
        i, j = draw.randrange(height), draw.randrange(width)
        rows = torch.tensor([r for r in range(height) if r != i], device=device)
        keys, values = (
            torch.cat([x[0, :, rows, j], x[0, :, i, :]], dim=1).double() for x in (key, value)
        )  # (C, H + W - 1)
        weights = (query[0, :, i, j].double() @ keys).softmax(-1)
        worst = max(worst, relative_error(out[0, :, i, j], values @ weights))
    if not worst <= HALF_LEAST[dtype]:
        raise CheckFailed(f"out has a relative error of {worst:.2e} beyond 2**31 elements")
    return worst
