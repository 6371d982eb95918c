"""The checks of the layer's kernels: by the CPU's kernels here, which they hold to the same."""

import pytest
import torch

import cuda_layer_checks
from ccnet_d2.ops import compiled
from cuda_layer_checks import check_layer_steps
from cuda_op_cases import DTYPES, Case, small_cases
from cuda_op_checks import CheckFailed

CPU = torch.device("cpu")
if not compiled.is_available():
    pytest.skip("the compiled operator is not built", allow_module_level=True)


@pytest.mark.parametrize("case", small_cases(0), ids=str)
def test_right_results_pass(case: Case) -> None:
    check_layer_steps(case, CPU)


def wrong_first(operator):
    """The operator, with the last number of its first result larger."""

    def call(*args):
        results = operator(*args)
        first = results[0] if isinstance(results, tuple) else results
        first = first.clone(memory_format=torch.preserve_format)
        last = first[(-1,) * first.dim()]
        last += last.abs() + 2
        return (first, *results[1:]) if isinstance(results, tuple) else first

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("criss_cross_packed_forward", "the forward pass of one tensor differs"),
        ("criss_cross_packed_backward", "grad_value of one tensor is off"),
        ("gated_residual_forward", "the residual is off by more than a rounding"),
        ("gated_residual_backward", "the residual's gradient is off by more than a rounding"),
        ("to_channels_last", "a channels-last copy differs"),
    ],
)
def test_a_wrong_number_is_noticed(
    dtype: str, operator: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small_cases(0, (dtype,))[1]
    library = torch.ops.ccnet_d2
    monkeypatch.setattr(library, operator, wrong_first(getattr(library, operator)))
    with pytest.raises(CheckFailed, match=message):
        check_layer_steps(case, CPU)


def test_a_result_in_another_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.ops.ccnet_d2
    residual = library.gated_residual_forward
    monkeypatch.setattr(
        library,
        "gated_residual_forward",
        lambda attended, gamma, x, last: residual(attended, gamma, x, not last),
    )
    with pytest.raises(CheckFailed, match="not laid out as asked for"):
        check_layer_steps(small_cases(0, ("float32",))[1], CPU)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda out: out * 1.1, "the loop's output is off by"),
        (lambda out: out + 0.2 * (out - out.detach()), "the loop's gradient of x is off by"),
        (lambda out: out.movedim(1, -1).contiguous().movedim(-1, 1), "the loop's result is not NCHW"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_loop_is_noticed(fault, message: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = cuda_layer_checks.criss_cross_loop
    monkeypatch.setattr(cuda_layer_checks, "criss_cross_loop", lambda *args: fault(loop(*args)))
    with pytest.raises(CheckFailed, match=message):
        check_layer_steps(small_cases(0, (dtype,))[0], CPU)
