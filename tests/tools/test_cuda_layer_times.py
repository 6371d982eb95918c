"""Times of a layer's steps: which steps run on what, and how they are counted; the time is given."""

import pytest
import torch

import check_cuda_op
import cuda_layer_times
from ccnet_d2.ops import compiled
from cuda_layer_times import STEP_HEAD, render_step, time_layer_steps

CPU = torch.device("cpu")
CHANNELS, SIZES = 24, (5, 7)
BYTES = CHANNELS * 5 * 7 * 4

needs_library = pytest.mark.skipif(not compiled.is_available(), reason="the compiled operator is not built")


@needs_library
def test_each_step_takes_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []

    def run(calls, repeats):
        assert repeats == 3 and len(calls) == cuda_layer_times.INPUT_SETS
        results.append([call() for call in calls])
        return float(len(results))

    monkeypatch.setattr(cuda_layer_times, "milliseconds_of", run)
    monkeypatch.setattr(cuda_layer_times, "TIMED_CHANNELS", (3, CHANNELS))
    torch.manual_seed(0)
    rows = time_layer_steps("float32", SIZES, {"bytes": 1e6}, CPU, 3)

    torch.manual_seed(0)
    maps = torch.stack([torch.randn(1, CHANNELS, *SIZES) for _ in range(2 * cuda_layer_times.INPUT_SETS)])
    attended, others = maps.chunk(2)
    steps = {row["step"]: list(zip(*outs, strict=True)) if isinstance(outs[0], tuple) else outs
             for row, outs in zip(rows, results, strict=True)}  # fmt: skip
    assert len(steps) == 7
    torch.testing.assert_close(torch.stack(steps.pop("copy, NCHW to channels-last")), others)
    for name, outs in steps.items():
        if name.startswith("residual"):
            torch.testing.assert_close(torch.stack(outs), others + 0.5 * attended)
            assert all(out.is_contiguous() == name.endswith("to NCHW") for out in outs)
        else:
            grads, gammas = outs
            torch.testing.assert_close(torch.stack(grads), 0.5 * others)
            torch.testing.assert_close(torch.stack(gammas).flatten(), (others * attended).flatten(1).sum(1))
    for number, row in enumerate(rows, 1):
        moved = 2 if row["step"].startswith("copy") else 3
        assert row["milliseconds"] == number and row["sizes"] == "5x7" and row["dtype"] == "float32"
        assert row["floor_milliseconds"] == pytest.approx(moved * BYTES / 1e6 * 1e3)
        assert row["times_floor"] == pytest.approx(number / row["floor_milliseconds"])


@needs_library
def test_the_other_map_lies_as_the_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    steps = {
        name: (channels_last, moved, lambda attended, gamma, x, name=name: seen.update({name: (attended, x)}))
        for name, (channels_last, moved, _) in cuda_layer_times.layer_steps().items()
    }
    monkeypatch.setattr(cuda_layer_times, "layer_steps", lambda: steps)
    monkeypatch.setattr(cuda_layer_times, "milliseconds_of", lambda calls, repeats: calls[0]() or 1.0)
    monkeypatch.setattr(cuda_layer_times, "TIMED_CHANNELS", (3, CHANNELS))
    time_layer_steps("bfloat16", SIZES, {"bytes": 1e6}, CPU, 1)
    assert len(seen) == len(steps)
    for name, (attended, x) in seen.items():
        assert not attended.is_contiguous() and attended.movedim(1, -1).is_contiguous()
        assert x.is_contiguous() == ("NCHW to" in name or "from NCHW" in name)


def test_the_tool_prints_them_after_the_operator_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"dtype": "float16", "sizes": "64x64", "step": "a step", "milliseconds": 0.25, "times_floor": 1.5}
    monkeypatch.setattr(check_cuda_op, "measure_ceilings", lambda device, dtypes: {"bytes": 3e12})
    monkeypatch.setattr(check_cuda_op, "time_sizes", lambda *args: [])
    monkeypatch.setattr(check_cuda_op, "time_layer_steps", lambda dtype, sizes, *args: [row | {"of": sizes}])
    ceilings, rows, steps = check_cuda_op.time_all(("float16",), CPU, 1, None)
    assert ceilings == {"bytes": 3e12} and rows == []
    assert [step["of"] for step in steps] == list(check_cuda_op.TIMED_SIZES)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-4:] == [STEP_HEAD, *[render_step(row)] * 3]
    assert "a step" in printed[-1] and printed[-1].split()[-2:] == ["0.2500", "1.50"]
