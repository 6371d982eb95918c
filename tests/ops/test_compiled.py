"""The compiled operator against a dense float64 oracle, for every instruction set that this processor has."""

import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ccnet_d2.ops import compiled, criss_cross_attention

if not compiled.is_available():
    pytest.skip(str(compiled.unavailable_reason()), allow_module_level=True)

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
CASES = 520
CASES_PER_TEST = 65
MOST_POSITIONS = 400  # the oracle holds N x N energies


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Runs the test once for each kind of kernel that the processor has; avx512_bf16 is for bf16 alone."""
    monkeypatch.setenv("CCNET_CPU_ISA", request.param)
    if compiled.instruction_set(torch.bfloat16) != request.param:
        pytest.skip(f"this processor or build has no {request.param} kernels")
    return request.param


def skip_if_for_bf16_alone(instruction_set, dtype):
    if instruction_set == "avx512_bf16" and dtype != torch.bfloat16:
        pytest.skip("these kernels are for bf16")


def dense_attention(query, key, value):
    """All N x N energies; those of positions that differ along more than one axis are masked out."""
    sizes = query.shape[2:]
    index = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))
    neighbour = (index[:, None] != index[None]).sum(-1) <= 1
    energy = query.flatten(2).transpose(1, 2) @ key.flatten(2)
    weights = energy.masked_fill(~neighbour, float("-inf")).softmax(-1)
    return (value.flatten(2) @ weights.transpose(1, 2)).reshape(value.shape)


def textbook_attention(query, key, value):
    """The usual 2D formulation in the inputs' own dtype: permuted copies, bmm, concatenation, softmax."""
    batch, _, height, width = query.shape

    def columns(x):
        return x.permute(0, 3, 1, 2).reshape(batch * width, -1, height)

    def rows(x):
        return x.permute(0, 2, 1, 3).reshape(batch * height, -1, width)

    vertical = torch.bmm(columns(query).transpose(1, 2), columns(key))
    vertical = vertical + torch.full((height,), float("-inf"), dtype=query.dtype).diag_embed().nan_to_num(
        0.0, 0.0
    )
    vertical = vertical.view(batch, width, height, height).transpose(1, 2)
    horizontal = torch.bmm(rows(query).transpose(1, 2), rows(key)).view(batch, height, width, width)
    weights = torch.cat([vertical, horizontal], dim=-1).softmax(-1)
    to_column = weights[..., :height].transpose(1, 2).reshape(batch * width, height, height)
    to_row = weights[..., height:].reshape(batch * height, width, width)
    from_column = torch.bmm(columns(value), to_column.transpose(1, 2)).view(batch, width, -1, height)
    from_row = torch.bmm(rows(value), to_row.transpose(1, 2)).view(batch, height, -1, width)
    return from_column.permute(0, 2, 3, 1) + from_row.permute(0, 2, 1, 3)


def draw_sizes(rng):
    while True:
        axes = rng.choice((1, 2, 2, 3))
        sizes = tuple(rng.choice((1, 2, rng.randint(1, 70), rng.randint(1, 24))) for _ in range(axes))
        if torch.Size(sizes).numel() <= MOST_POSITIONS:
            return sizes


def draw_tensor(rng, generator, batch, channels, sizes, dtype):
    """Normal numbers behind one of the strides that callers come with."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    layout = rng.choice(("contiguous", "channels_last", "sliced", "packed", "transposed", "expanded"))
    if layout == "channels_last":
        return normal(batch, *sizes, channels).movedim(-1, 1)
    if layout == "sliced":  # every second channel and position
        return normal(batch, 2 * channels, *sizes[:-1], 2 * sizes[-1])[:, ::2, ..., ::2]
    if layout == "packed":  # some channels of a wider channels-last tensor
        return normal(batch, *sizes, channels + 5).movedim(-1, 1)[:, 3 : 3 + channels]
    if layout == "transposed":
        return normal(batch, channels, *reversed(sizes)).permute(0, 1, *range(len(sizes) + 1, 1, -1))
    if layout == "expanded":
        return normal(1, channels, *sizes[:-1], 1).expand(batch, channels, *sizes)
    return normal(batch, channels, *sizes)


def normal_case(batch, channels, sizes, dtype, seed=0):
    """Normal query, key and value of so many channels each, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    *inputs, grad_out = (
        torch.randn(batch, c, *sizes, generator=generator).to(dtype) for c in (*channels, channels[-1])
    )
    return inputs, grad_out


def outputs_and_gradients(function, inputs, grad_out):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def run_compiled(inputs, grad_out):
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(*inputs)
    return [out, *torch.ops.ccnet_d2.criss_cross_backward(grad_out, *inputs, out, lse)]


def relative_error(got, wanted, scale):
    """Largest deviation over the larger of the wanted tensor's and the natural scale.

    The gradients of energies are differences of nearly equal numbers where one key takes all weight (they are
    exactly 0 for a single key), so that their own size is no measure of the arithmetic.
    """
    assert got.isfinite().all()
    return ((got.double() - wanted).abs().max() / max(wanted.abs().max().item(), scale)).item()


def check_drawn_case(rng, generator, batch, sizes, key_channels, channels, dtype, tolerance):
    wanted_channels = (key_channels, key_channels, channels, channels)
    query, key, value, grad_out = (
        draw_tensor(rng, generator, batch, c, sizes, dtype) for c in wanted_channels
    )
    wanted = outputs_and_gradients(
        dense_attention, [x.double() for x in (query, key, value)], grad_out.double()
    )
    got = run_compiled((query, key, value), grad_out)
    scales = (1.0, key_channels**0.5 * channels**0.5, key_channels**0.5 * channels**0.5, 1.0)
    for name, g, w, scale in zip(("out", "query", "key", "value"), got, wanted, scales, strict=True):
        error = relative_error(g, w, scale)
        assert error < tolerance, f"{name}: {error} for {batch=} {sizes=} {key_channels=} {channels=}"


@pytest.mark.parametrize("seed", range(CASES // CASES_PER_TEST))
def test_fp32_is_exact_for_drawn_shapes_and_strides(seed, instruction_set):
    skip_if_for_bf16_alone(instruction_set, torch.float32)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(CASES_PER_TEST):
        batch, sizes = rng.randint(1, 3), draw_sizes(rng)
        key_channels, channels = rng.choice((1, 3, 8, 17, 33)), rng.choice((1, 5, 16, 31, 64, 65, 81))
        check_drawn_case(rng, generator, batch, sizes, key_channels, channels, torch.float32, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_long_lines_of_many_channels_are_exact(seed, dtype, tolerance, instruction_set):
    # From 64 positions and 192 channels on, matrix units do fp32 and fp16 as well.
    skip_if_for_bf16_alone(instruction_set, dtype)
    rng, generator = random.Random(200 + seed), torch.Generator().manual_seed(200 + seed)
    for _ in range(12):
        sizes = [rng.choice((64, 65, 79, 80, 81, 96, 97, 98, 111, 112, 113, 128, 129, 145))]
        sizes += [rng.choice((1, 2, 3)) for _ in range(rng.randint(0, 2))]
        rng.shuffle(sizes)
        key_channels, channels = rng.choice((1, 8, 17, 33, 64)), rng.choice((192, 193, 208, 224, 225, 257))
        batch = rng.randint(1, 2) if torch.Size(sizes).numel() < 300 else 1
        check_drawn_case(rng, generator, batch, tuple(sizes), key_channels, channels, dtype, tolerance)


def test_fp32_errors_are_those_of_plain_pytorch(instruction_set):
    skip_if_for_bf16_alone(instruction_set, torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, c, 97, 66, generator=generator) for c in (16, 16, 200)]
    grad_out = torch.randn(1, 200, 97, 66, generator=generator)
    exact = outputs_and_gradients(textbook_attention, [x.double() for x in inputs], grad_out.double())
    plain = outputs_and_gradients(textbook_attention, inputs, grad_out)
    for g, p, e in zip(run_compiled(inputs, grad_out), plain, exact, strict=True):
        assert (g.double() - e).norm() <= 2 * (p.double() - e).norm()


@pytest.mark.parametrize("exponent", [120, -60, -100])
def test_fp32_keeps_its_precision_far_from_one(exponent, instruction_set):
    skip_if_for_bf16_alone(instruction_set, torch.float32)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, c, 3, 97, generator=generator) for c in (8, 8, 200))
    scaled = value * 2.0**exponent
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, scaled)
    wanted = dense_attention(query.double(), key.double(), scaled.double())
    assert ((out.double() - wanted).norm() / wanted.norm()).item() < 1e-6
    grad_value = torch.ops.ccnet_d2.criss_cross_backward(scaled, query, key, value, out, lse)[2]
    ones = torch.ops.ccnet_d2.criss_cross_backward(value, query, key, value, out, lse)[2]
    torch.testing.assert_close(grad_value * 2.0**-exponent, ones, rtol=1e-5, atol=1e-6)


def test_bf16_is_right_for_drawn_shapes_and_strides(instruction_set):
    rng, generator = random.Random(100), torch.Generator().manual_seed(100)
    for _ in range(CASES_PER_TEST):
        batch, sizes = rng.randint(1, 3), draw_sizes(rng)
        key_channels, channels = (
            rng.choice((1, 3, 8, 17, 32, 33, 64)),  # 32 and 64: whole rows, multiplied in place
            rng.choice((1, 5, 31, 32, 64, 65, 81, 130, 161)),
        )
        # A few roundings to 8 bits; a wrong index or an unread padding would give errors of 1.
        check_drawn_case(rng, generator, batch, sizes, key_channels, channels, torch.bfloat16, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(33, 20), (17, 65), (1, 40), (40, 1), (128, 3), (97, 5), (2, 146)])
def test_half_precision_errors_are_those_of_plain_pytorch(dtype, sizes, instruction_set):
    skip_if_for_bf16_alone(instruction_set, dtype)
    inputs, grad_out = normal_case(2, (16, 16, 70), sizes, dtype)
    exact = outputs_and_gradients(dense_attention, [x.double() for x in inputs], grad_out.double())
    plain = outputs_and_gradients(textbook_attention, inputs, grad_out)
    got = run_compiled(inputs, grad_out)
    for factor, g, p, e in zip((2, 3, 3, 3), got, plain, exact, strict=True):
        assert (g.double() - e).norm() <= factor * (p.double() - e).norm()


def flash_attention(query, key, value):
    """PyTorch's fused attention along one axis."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        rows = (x.mT.contiguous()[:, None] for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*rows, scale=1.0)[:, 0].mT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "length"), [(8, 129), (64, 65), (64, 257), (32, 700)])
@pytest.mark.parametrize("scale", [1, 3])
def test_peaked_attention_in_half_precision_is_as_exact_as_flash_attention(
    dtype, channels, length, scale, instruction_set
):
    """Both take the mean of the weights' gradients from the rounded output, which weighs where few keys count."""
    skip_if_for_bf16_alone(instruction_set, dtype)
    (query, key, value), grad_out = normal_case(2, (channels,) * 3, (length,), dtype)
    inputs = [scale * query, scale * key, value]
    exact = outputs_and_gradients(dense_attention, [x.double() for x in inputs], grad_out.double())
    flash = outputs_and_gradients(flash_attention, inputs, grad_out)
    for g, f, e in zip(run_compiled(inputs, grad_out), flash, exact, strict=True):
        assert (g.double() - e).norm() <= 1.5 * (f.double() - e).norm()


@pytest.mark.parametrize("length", [257, 300, 337, 673, 700])
@pytest.mark.parametrize("channels", [40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_lines_are_handled_in_blocks(dtype, channels, length, instruction_set):
    inputs, grad_out = normal_case(1, (8, 8, channels), (length,), dtype, seed=length)
    exact = outputs_and_gradients(dense_attention, [x.double() for x in inputs], grad_out.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for g, e in zip(run_compiled(inputs, grad_out), exact, strict=True):
        assert (g.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize(
    ("dtype", "sizes", "channels"),
    [(torch.float32, (29, 37), 2048), (torch.float32, (65, 80), 512), (torch.bfloat16, (29, 37), 4096)],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_large_results_are_written_past_the_caches(dtype, sizes, channels, packed, instruction_set):
    skip_if_for_bf16_alone(instruction_set, dtype)
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(1, *sizes, 64 + 2 * channels, generator=generator).to(dtype).movedim(-1, 1)
    query, key, value, grad_out = parts.split([32, 32, channels, channels], dim=1)
    exact = outputs_and_gradients(
        textbook_attention, [x.double() for x in (query, key, value)], grad_out.double()
    )
    assert exact[0].numel() * dtype.itemsize > 8 * 2**20  # what the kernels take for large
    if packed:
        one = torch.cat([query, key, value], dim=1)
        out, lse = torch.ops.ccnet_d2.criss_cross_packed_forward(one, 32)
        grads = torch.ops.ccnet_d2.criss_cross_packed_backward(grad_out, one, 32, out, lse)
        got = [out, *grads.split([32, 32, channels], dim=1)]
    else:
        got = run_compiled((query, key, value), grad_out)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1200), (2, 1200), (1200, 2)])
def test_half_precision_errors_do_not_grow_with_the_line(dtype, sizes, instruction_set):
    """Sums over its blocks of queries are rounded once, not with every block."""
    skip_if_for_bf16_alone(instruction_set, dtype)
    inputs, grad_out = normal_case(1, (8, 8, 40), sizes, dtype)
    exact = outputs_and_gradients(textbook_attention, [x.double() for x in inputs], grad_out.double())
    for factor, g, e in zip((1.4, 4, 3, 1.8), run_compiled(inputs, grad_out), exact, strict=True):
        rounded_once = (e.to(dtype).double() - e).norm()
        assert (g.double() - e).norm() <= factor * rounded_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_and_constant_energies_give_no_nan(dtype, instruction_set):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 6, 7, 9, generator=generator).to(dtype)
    for scale in (300.0, 0.0):  # energies of about +-1e5, beyond what fp16 holds, and all equal
        query, key = (scale * torch.randn(1, 2, 7, 9, generator=generator).to(dtype) for _ in range(2))
        got = run_compiled((query, key, value), value)
        assert all(g.isfinite().all() for g in got)
        wanted = dense_attention(query.double(), key.double(), value.double())
        # Energies of 1e5 are known to 1e-7 of that in fp32: weights to a few per cent.
        torch.testing.assert_close(got[0].double(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peak", [60.0, 100.0, 400.0])
def test_weights_that_underflow_count_as_nothing(peak, dtype, instruction_set):
    # Weights of e^-60 to e^-400 beside the largest, through the range in which float32 grows coarse and ends.
    generator = torch.Generator().manual_seed(0)
    query = torch.ones(1, 1, 9, 37, dtype=dtype)
    key = (-peak * torch.rand(1, 1, 9, 37, generator=generator)).to(dtype)
    value, grad_out = (torch.randn(1, 40, 9, 37, generator=generator).to(dtype) for _ in range(2))
    got = run_compiled((query, key, value), grad_out)
    wanted = outputs_and_gradients(
        dense_attention, [x.double() for x in (query, key, value)], grad_out.double()
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for g, w, scale in zip(got, wanted, (1.0, 5.0 * peak, 5.0, 1.0), strict=True):
        assert relative_error(g, w, scale) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_energies_stay_nan(which, dtype, instruction_set):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, c, 6, 35, generator=generator).to(dtype) for c in (4, 4, 33)]
    inputs[which][0, 2, 3, 17] = float("nan")
    out = torch.ops.ccnet_d2.criss_cross_forward(*inputs)[0]
    wanted = dense_attention(*(x.double() for x in inputs))
    assert 0 < wanted.isnan().sum() < wanted.numel()
    torch.testing.assert_close(out.double(), wanted, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ((6, 35), (..., 17)),
        ((6, 35), (..., 3, slice(None))),
        ((3, 4, 20), (..., 2, slice(None), 5)),
        ((3, 4, 20), (..., 1, 2, slice(None))),
        ((3, 4, 20), (..., 7)),  # two of three axes have no finite energy there
        ((300, 2), (..., 1)),
    ],
)
def test_lines_of_keys_of_minus_infinity_weigh_nothing(sizes, line, dtype, instruction_set):
    skip_if_for_bf16_alone(instruction_set, dtype)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, c, *sizes, generator=generator).to(dtype) for c in (4, 4, 33))
    query.abs_().add_(0.5)
    key[line] = -float("inf")
    out, lse = torch.ops.ccnet_d2.criss_cross_forward(query, key, value)
    wanted = dense_attention(*(x.double() for x in (query, key, value)))
    assert wanted.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(out.double(), wanted, rtol=0.05, atol=0.05)
    # Not one finite energy: nothing to take a mean of.
    out = torch.ops.ccnet_d2.criss_cross_forward(query, key.fill_(-float("inf")), value)[0]
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("sizes", "channels"), [((35, 33), 40), ((65, 35), 192)])
def test_same_bits_in_every_run_and_for_any_number_of_threads(dtype, layout, sizes, channels):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, c, *sizes, generator=generator).to(dtype).contiguous(memory_format=layout)
        for c in (8, 8, channels)
    ]
    grad_out = torch.randn(2, channels, *sizes, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(run_compiled(inputs, grad_out))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_values_do_not_depend_on_memory_format():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, c, 9, 21, generator=generator) for c in (8, 8, 40)]
    grad_out = torch.randn(2, 40, 9, 21, generator=generator)
    plain = run_compiled(inputs, grad_out)
    last = run_compiled(
        [x.contiguous(memory_format=torch.channels_last) for x in inputs],
        grad_out.contiguous(memory_format=torch.channels_last),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, last, strict=True))
    assert plain[0].is_contiguous(memory_format=torch.channels_last)


def test_empty_batch():
    query, value = torch.randn(0, 4, 5, 6), torch.randn(0, 7, 5, 6)
    got = run_compiled((query, query, value), value)
    assert [g.shape for g in got] == [value.shape, query.shape, query.shape, value.shape]


def test_several_threads_share_the_work():
    # Two threads that only took turns would not be told apart by the result; the time they are busy tells.
    import time

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor only")
    inputs = [torch.randn(1, 80, 80, c).movedim(-1, 1) for c in (32, 32, 256)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.ops.ccnet_d2.criss_cross_forward(*inputs)
        thread_start, process_start = time.thread_time(), time.process_time()
        for _ in range(10):
            torch.ops.ccnet_d2.criss_cross_forward(*inputs)
        own, all_threads = time.thread_time() - thread_start, time.process_time() - process_start
    finally:
        torch.set_num_threads(threads)
    assert all_threads > 1.3 * own


@pytest.mark.parametrize("sizes", [(5,), (4, 3), (1, 5), (5, 1), (2, 3, 4)])
def test_gradcheck(sizes):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, c, *sizes, generator=generator, dtype=torch.float64, requires_grad=True)
        for c in (3, 3, 4)
    ]
    assert torch.autograd.gradcheck(compiled.criss_cross_attention, inputs)


def test_only_the_wanted_gradients_are_asked_for():
    query, key, value = (torch.randn(1, c, 4, 5) for c in (3, 3, 6))
    value.requires_grad_()
    criss_cross_attention(query, key, value, backend="compiled").sum().backward()
    # The columns of the weights sum over queries; with equal grad_out that is what every value receives.
    assert value.grad.sum().item() == pytest.approx(6 * 20, rel=1e-5)
    assert query.grad is None


def test_inputs_that_do_not_fit_are_refused():
    query, value = torch.randn(1, 4, 5, 6), torch.randn(1, 7, 5, 6)
    forward = torch.ops.ccnet_d2.criss_cross_forward
    with pytest.raises(RuntimeError, match=r"^key must have the channels of query\.$"):
        forward(query, torch.randn(1, 3, 5, 6), value)
    with pytest.raises(RuntimeError, match="value must have the spatial sizes"):
        forward(query, query, torch.randn(1, 7, 5, 5))
    with pytest.raises(RuntimeError, match="value must have the dtype"):
        forward(query, query, value.double())
    with pytest.raises(RuntimeError, match="one to three spatial axes"):
        forward(query[:, :, 0, 0], query[:, :, 0, 0], value[:, :, 0, 0])
    with pytest.raises(RuntimeError, match=r"no torch\.int32 kernel"):
        compiled.criss_cross_attention(query.int(), query.int(), value.int())


def test_memory_that_runs_out_is_named_where_torch_keeps_the_cause_to_itself(tmp_path):
    # Up to torch 2.12 an error of torch's comes without its cause, as does a newer one's to who asks an older torch.
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and a loader that takes functions of other libraries")
    older, source = tmp_path / "older.so", tmp_path / "older.c"
    source.write_text("unsigned long long aoti_torch_abi_version(void) { return 0x020a000000000000ull; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", older], check=True)
    code = (
        "import torch, ccnet_d2.ops\n"
        "query, value = (torch.zeros(1, 1, 1).expand(2**26, c, 2**12) for c in (1, 1024))\n"  # 2^50 bytes
        "torch.ops.ccnet_d2.criss_cross_forward(query, query, value)\n"
    )
    environment = {**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {older}".strip()}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "RuntimeError: a tensor of shape (67108864, 4096, 1024) could not be made, "
        "most likely as there is not enough memory."
    )


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"^CCNET_CPU_ISA=avx1024 is unknown: choose portable"):
        criss_cross_attention(*(torch.randn(1, 2, 3, 4) for _ in range(3)), backend="compiled")
