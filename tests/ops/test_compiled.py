"""The compiled op beyond the checks that every backend passes: drawn cases, instruction sets, torch's machinery."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ccnet_d2.ops import compiled, criss_cross_attention
from ccnet_d2.ops.residual import gated_residual

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "projects" / "CCNet" / "tools"))
from attention_formulations import textbook_attention

pytestmark = pytest.mark.skipif(
    not compiled.is_available(), reason=f"the compiled op is not here: {compiled.unavailable_reason()}"
)

CHUNKS, CASES_IN_CHUNK = 26, 20
ISAS = ("portable", "avx2", "avx512", "amx")


def draw_sizes(rng):
    """One to three sizes of 1 to 70, at most some hundred positions, so that the oracle stays cheap."""
    axes = rng.choice((1, 2, 2, 2, 3))
    while True:
        sizes = tuple(
            rng.choice((1, rng.randint(2, 9), rng.randint(2, 70), rng.randint(10, 70))) for _ in range(axes)
        )
        if math.prod(sizes) <= 700:
            return sizes


def lay_out(x, kind):
    """The same values (for "expanded" those of the first image and channel) in another memory layout."""
    if kind == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "sliced":
        wide = x.new_full((x.shape[0], x.shape[1] + 2, *x.shape[2:-1], 2 * x.shape[-1] + 1), float("nan"))
        view = wide[:, 1:-1, ..., 1::2]
        view.copy_(x)
        return view
    if kind == "slice of channels":
        rows = x.movedim(1, -1)
        wide = x.new_full((*rows.shape[:-1], x.shape[1] + 3), float("nan"))
        wide[..., 2:-1] = rows
        return wide[..., 2:-1].movedim(-1, 1)
    if kind == "expanded":
        return x[:1, :1].expand_as(x)
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def draw_case(seed, dtype=torch.float32):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes, batch = draw_sizes(rng), rng.randint(1, 3)
    key_channels, channels = (
        rng.choice((1, 3, 7, 8, 16, 17, 33)),
        rng.choice((1, 2, 5, 16, 31, 32, 47, 65, 130)),
    )
    tensors = []
    for count in (key_channels, key_channels, channels, channels):
        x = torch.randn(batch, count, *sizes, generator=generator)
        x = (x * key_channels**-0.25 if count == key_channels else x).to(dtype)
        kinds = ["plain", "channels-last", "sliced", "slice of channels", "expanded", "transposed"]
        tensors.append(lay_out(x, rng.choice(kinds)))
    return tensors


def with_gradients(function, tensors, dtype=None):
    *inputs, grad = (x.detach() if dtype is None else x.detach().to(dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def run_compiled(*inputs):
    return criss_cross_attention(*inputs, backend="compiled")


def reference(*inputs):
    return criss_cross_attention(*inputs, backend="reference")


def errors(got, exact):
    """Relative errors in the Euclidean norm; gradients that are zero (a single key) are compared with 1."""
    found = []
    for g, e in zip(got, exact, strict=True):
        scale, size = e.norm().item(), math.sqrt(e.numel())
        found.append((g.double() - e).norm().item() / (scale if scale > 1e-9 * size else size))
    return found


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases_are_within_1e_5_of_float64(chunk):
    for seed in range(chunk * CASES_IN_CHUNK, (chunk + 1) * CASES_IN_CHUNK):
        case = draw_case(seed)
        wrong = errors(with_gradients(run_compiled, case), with_gradients(reference, case, torch.float64))
        assert max(wrong) < 1e-5, f"seed {seed}: shapes {[tuple(x.shape) for x in case]}, errors {wrong}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", range(4))
def test_half_precision_is_about_as_exact_as_the_plain_formulation(chunk, dtype):
    for seed in range(1000 + 10 * chunk, 1010 + 10 * chunk):
        case = draw_case(seed, dtype)
        exact = with_gradients(reference, case, torch.float64)
        ours = errors(with_gradients(run_compiled, case), exact)
        plain = errors(with_gradients(textbook_attention, case), exact)
        rounding = torch.finfo(dtype).eps / 2
        for what, got, allowed in zip("oqkv", ours, plain, strict=True):
            factor = 2 if what == "o" else 3
            assert got <= factor * max(allowed, rounding), f"seed {seed}, {what}: {got} against {allowed}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", isa)
    chosen = compiled.instruction_set(dtype)
    expected = "avx512" if isa == "amx" and dtype != torch.bfloat16 else isa
    if chosen != expected:
        pytest.skip(f"{isa} is not here, {chosen} runs instead")
    for seed in range(2000, 2012):
        case = draw_case(seed, dtype)
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
        wrong = errors(with_gradients(run_compiled, case), with_gradients(reference, case, torch.float64))
        assert max(wrong) < tolerance, f"seed {seed}: {wrong}"


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="CCNET_CPU_ISA=mmx is unknown"):
        run_compiled(*(torch.zeros(1, 2, 3, 3) for _ in range(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(23, 31), (3, 9, 11)])
def test_bitwise_equal_between_runs_and_numbers_of_threads(sizes, dtype):
    generator = torch.Generator().manual_seed(0)
    case = [torch.randn(2, c, *sizes, generator=generator).to(dtype) for c in (8, 8, 70, 70)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(run_compiled, case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (9, 1), (5, 6), (1, 1, 1), (1, 4, 1)])
@pytest.mark.parametrize("logit", [1e5, -1e5])
def test_huge_equal_logits_are_finite(sizes, dtype, logit):
    root = abs(logit) ** 0.5
    query = torch.full((1, 4, *sizes), root / 2).to(dtype)
    key = torch.full((1, 4, *sizes), math.copysign(root / 2, logit)).to(dtype)
    value = torch.randn(1, 5, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = with_gradients(run_compiled, [query, key, value, torch.ones_like(value)])
    assert all(torch.isfinite(x).all() for x in results)
    # All energies are equal: every key weighs the same.
    torch.testing.assert_close(
        results[0].float(), reference(torch.zeros_like(key), key, value).float(), atol=2e-2, rtol=2e-2
    )


def test_empty_batch():
    out = run_compiled(*(torch.zeros(0, c, 3, 4) for c in (2, 2, 5)))
    assert out.shape == (0, 5, 3, 4)


@pytest.mark.parametrize("sizes", [(6,), (5, 4), (3, 4, 2)])
def test_operators_pass_opcheck(sizes):
    # The check of ahead-of-time compilation is slow and does not depend on the number of axes.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if len(sizes) == 2 else []
    inputs = [torch.randn(2, c, *sizes, requires_grad=True) for c in (3, 3, 5)]
    torch.library.opcheck(torch.ops.ccnet_d2.criss_cross_forward.default, inputs, test_utils=checks)
    out, lse = (x.detach() for x in torch.ops.ccnet_d2.criss_cross_forward(*inputs))
    rest = (torch.randn_like(out), *(x.detach() for x in inputs), out, lse)
    torch.library.opcheck(torch.ops.ccnet_d2.criss_cross_backward.default, rest, test_utils=checks)
    gamma, x = torch.randn(1, requires_grad=True), torch.randn(2, 5, *sizes, requires_grad=True)
    torch.library.opcheck(torch.ops.ccnet_d2.gated_residual_forward.default, (out.requires_grad_(), gamma, x))


def test_compiles_to_one_graph_and_exports():
    inputs = [torch.randn(1, c, 5, 6) for c in (3, 3, 7)]
    expected = with_gradients(run_compiled, [*inputs, torch.ones(1, 7, 5, 6)])
    function = torch.compile(run_compiled, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(function, [*inputs, torch.ones(1, 7, 5, 6)]), expected, strict=True):
        torch.testing.assert_close(a, b)

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return criss_cross_attention(query, key, value)

    program = torch.export.export(Model(), tuple(inputs))
    assert any("criss_cross_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), expected[0])


def test_second_derivatives_are_refused():
    inputs = [torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(3)]
    (grad,) = torch.autograd.grad(run_compiled(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_flops_are_counted():
    inputs = [torch.randn(2, c, 4, 6, requires_grad=True) for c in (3, 3, 5)]
    pairs = 2 * (4 * 6) * (4 + 6)
    with FlopCounterMode(display=False) as counter:
        out = run_compiled(*inputs)
    assert counter.get_total_flops() == 2 * pairs * (3 + 5)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 3 + 2 * 5)


def test_nothing_larger_than_the_tensors_is_kept():
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    inputs = [torch.randn(1, c, 20, 30, requires_grad=True) for c in (2, 2, 4)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run_compiled(*inputs)
    assert sum(kept.values()) == 600 * (2 + 2 + 4 + 4 + 1)  # query, key, value, out and one statistic


def test_autocast_brings_different_dtypes_together():
    query, key, value = (torch.randn(1, c, 5, 6) for c in (4, 4, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = criss_cross_attention(query.bfloat16(), key, value)
        alike = criss_cross_attention(query, key, value)
    assert mixed.dtype == torch.bfloat16 and alike.dtype == torch.float32
    torch.testing.assert_close(mixed.float(), alike, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(alike, criss_cross_attention(query, key, value))


@pytest.mark.parametrize("x_layout", ["plain", "channels-last", "sliced"])
@pytest.mark.parametrize("sizes", [(70,), (9, 8), (2, 3, 13)])
@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_gated_residual(dtype, x_dtype, sizes, x_layout):
    generator = torch.Generator().manual_seed(0)
    attended, x, grad = (
        torch.randn(2, 67, *sizes, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    attended = lay_out(attended.to(dtype), "channels-last")
    x, grad = lay_out(x.to(x_dtype), x_layout), lay_out(grad.to(x_dtype), x_layout)
    gamma = torch.tensor([0.75])
    inputs = [t.detach().requires_grad_() for t in (attended, gamma, x)]
    out = gated_residual(*inputs)
    if x_layout != "sliced":
        assert out.stride() == x.stride()
    assert out.dtype == x_dtype
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = exact[2] + exact[1] * exact[0]
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for got, want in zip(torch.autograd.grad(out, inputs, grad), wanted, strict=True):
        # The gradient of gamma is a sum over all elements.
        atol = tolerance * math.sqrt(x.numel() / want.numel())
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=tolerance)
