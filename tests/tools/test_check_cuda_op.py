"""The check of the op's kernels: by the CPU's kernels here, which it holds to the same list."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import check_cuda_op
import cuda_op_checks
from ccnet_d2.ops import compiled
from cuda_op_cases import SMALL_SHAPES, Case, draw_cases, make_inputs, small_cases
from cuda_op_checks import CheckFailed, differentiate, judge, masked_attention
from official_kernels import OfficialKernels

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(not compiled.is_available(), reason="the compiled operator is not built")


@needs_library
def test_small_cases_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "folder" / "report.json"
    arguments = ["--device", "cpu", "--small", "--dtype", "bfloat16", "--json", str(report)]
    assert check_cuda_op.main(arguments) == 0
    results = json.loads(report.read_text())
    assert results["cases"] == len(SMALL_SHAPES) and not results["failures"]
    assert 0 < results["largest_errors"]["bfloat16"]["grad_key"] < 3e-2
    assert f"{len(SMALL_SHAPES)} of {len(SMALL_SHAPES)}: Case(" in capsys.readouterr().out


@needs_library
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x * 1.001, "has a relative error of 1.00e-03"),
        (lambda x: torch.full_like(x, float("nan")), "is not finite"),
    ],
)
def test_wrong_results_are_noticed(
    small: bool,
    fault: Callable[[Tensor], Tensor],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = cuda_op_checks.run_kernels
    case = small_cases(0, ("float32",))[1]

    def wrong(*args: object, **kwargs: object) -> dict[str, Tensor]:
        results = run(*args, **kwargs)
        return results | {"grad_key": fault(results["grad_key"])}

    monkeypatch.setattr(cuda_op_checks, "run_kernels", wrong)
    for name in ("small_cases", "draw_cases"):
        monkeypatch.setattr(check_cuda_op, name, lambda *args: [case])
    # NaN equals nothing, itself included.
    message = "differs between two runs" if "finite" in message and not small else message
    arguments = ["--device", "cpu", *(["--small"] if small else [])]
    assert check_cuda_op.main(arguments) == 1
    assert f"grad_key {message}" in capsys.readouterr().out


def test_results_that_change_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([{"out": torch.zeros(2)}, {"out": torch.tensor([0.0, 1e-9])}])
    monkeypatch.setattr(cuda_op_checks, "run_kernels", lambda case, inputs: next(results))
    with pytest.raises(cuda_op_checks.CheckFailed, match="out differs between two runs"):
        cuda_op_checks.check_case(small_cases(0)[0], CPU)


def exact_results(case: Case) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    inputs = make_inputs(case, CPU)
    return inputs, differentiate(masked_attention, tuple(x.double() for x in inputs))


def test_errors_are_held_to_those_of_the_textbook_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as large in the output, and three times in the gradients."""
    case = Case("float32", 1, (4, 5), 8, 16, "contiguous", 1.0, 0)
    inputs, exact = exact_results(case)
    monkeypatch.setattr(cuda_op_checks, "textbook_attention", lambda *x: 1.01 * masked_attention(*x))
    judge(case, inputs, {name: x * (1.019 if name == "out" else 1.029) for name, x in exact.items()})
    for name, factor in (("out", 1.021), ("grad_query", 1.031), ("grad_key", 1.031), ("grad_value", 1.031)):
        with pytest.raises(CheckFailed, match=f"{name} has a relative error"):
            judge(case, inputs, exact | {name: factor * exact[name]})


@pytest.mark.parametrize(
    ("batch", "scale", "judged"), [(1, 30.0, True), (1, 1e5, False), (2500, 1.0, True), (2501, 1.0, False)]
)
def test_what_one_rounding_decides_is_not_held_to_an_oracle(batch: int, scale: float, judged: bool) -> None:
    """Nor are more positions than the oracle takes in a moment."""
    case = Case("float32", batch, (4, 5), 8, 8, "contiguous", scale, 0)
    inputs, exact = exact_results(case)
    wrong = exact | {"out": 1.1 * exact["out"]}
    if judged:
        with pytest.raises(CheckFailed, match=r"out has a relative error of 1\.00e-01"):
            judge(case, inputs, wrong)
    else:
        assert judge(case, inputs, wrong) == {}


@needs_library
@pytest.mark.parametrize("poisoned", [True, False])
def test_memory_is_poisoned_before_each_pass(poisoned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    case = small_cases(0, ("float32",))[1]
    monkeypatch.setattr(cuda_op_checks, "poison", lambda *_: order.append("poison"))
    for name in ("criss_cross_forward", "criss_cross_backward"):
        operator = getattr(torch.ops.ccnet_d2, name)

        def call(*inputs: Tensor, name: str = name, operator: Callable[..., object] = operator) -> object:
            order.append(name)
            return operator(*inputs)

        monkeypatch.setattr(torch.ops.ccnet_d2, name, call)
    results = cuda_op_checks.run_kernels(case, make_inputs(case, CPU), poisoned=poisoned)
    assert set(results) == {"lse", *cuda_op_checks.NAMES}
    if poisoned:
        assert order == ["poison", "criss_cross_forward", "poison", "criss_cross_backward"]
    else:
        assert order == ["criss_cross_forward", "criss_cross_backward"]


def test_lists_of_cases() -> None:
    assert draw_cases(0, 0) == []
    drawn = draw_cases(90, 3)
    assert len(drawn) == 90 and drawn == draw_cases(90, 3) != draw_cases(90, 4)
    assert len(draw_cases(91, 3)) == 93  # as many of each dtype, and no fewer than asked for
    assert {case.dtype for case in draw_cases(20, 0, ("float16",))} == {"float16"}
    assert len(small_cases(0)) == 3 * len(SMALL_SHAPES)


@pytest.mark.parametrize("key_channels", [8, 64])
def test_logits_are_as_large_as_the_case_says(key_channels: int) -> None:
    case = Case("float32", 1, (30, 40), key_channels, 16, "contiguous", 3.0, 0)
    query, key, value, grad = make_inputs(case, CPU)
    logits = query.flatten(2)[0].T @ key.flatten(2)[0]
    assert logits.std().item() == pytest.approx(3.0, rel=0.05)
    assert value.std().item() == pytest.approx(1, rel=0.05) == grad.std().item()


def test_layouts_are_what_they_are_called() -> None:
    layouts = {case.layout: case for case in small_cases(0, ("bfloat16",))}
    value = {name: make_inputs(case, CPU)[2] for name, case in layouts.items()}
    assert value["contiguous"].is_contiguous()
    assert value["channels_last"].movedim(1, -1).is_contiguous()
    assert value["expanded"].stride(0) == 0 and value["expanded"].stride(1) == 1
    assert value["sliced"].storage_offset() == 1 and value["sliced"].stride(1) == 1


def test_official_kernels_are_asked_for_where_they_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        check_cuda_op.parse_arguments(["--device", "cpu", "--official", "official.so"])
    assert "--official needs --device cuda" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"missing\.so"):
        OfficialKernels(tmp_path / "missing.so")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--repeats=0", "'0' is no whole number from 1 on"),
        ("--cases=-1", "--cases must be 0 or more, got -1"),
    ],
)
def test_wrong_numbers_are_refused_at_once(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        check_cuda_op.parse_arguments([argument])
    assert message in capsys.readouterr().err


@needs_library
def test_another_library_is_not_taken_for_the_official_kernels() -> None:
    [library] = Path(compiled.__file__).parent.glob("_C_cpu.*")
    with pytest.raises(OSError, match="not made from the official"):
        OfficialKernels(library)
