"""Peak memory of the candidates of benchmark_op.py, as figures of a process of its own."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "projects" / "CCNet" / "tools"))
import op_memory
from op_arguments import parse_arguments
from op_candidates import Case

MEMORY = Path("/proc/self/clear_refs")


def case_of(size, channels=16):
    command = ["--channels", str(channels), "--device", "cpu", "--backends", "matmul", "--recurrence", "3"]
    return Case(parse_arguments(command), (size, size), torch.float32)


def test_every_candidate_in_every_pass():
    case = case_of(6)
    found = op_memory.peaks(case)
    cores = [*case.core_calls(backward=False)]
    layers = [*case.modules()]
    step = "training step, R=3 (non-local: once)"
    assert [(name, what) for name, what, _ in found] == [
        *((name, what) for what in ("forward", "forward+backward") for name in cores),
        *((name, what) for what in (step, f"{step}, in a network") for name in layers),
    ]
    for _, what, figures in found:
        assert set(figures) == {"mb"} | ({"output_mb"} if what.startswith("forward") else set())
        assert (figures["mb"] is not None) == os.access(MEMORY, os.W_OK)
        assert figures.get("output_mb", 16 * 6 * 6 * 4 / 1e6) == 16 * 6 * 6 * 4 / 1e6


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="the system does not tell the peak")
def test_what_was_freed_before_hides_nothing():
    """The attended map, the gradients of the inputs and the textbook form's copies and volumes, in megabytes."""
    case = case_of(48, channels=64)
    case.arguments.non_local = False
    room = [torch.ones(2**18) for _ in range(64)]
    del room[::2]
    figures = {(name, what): figures["mb"] for name, what, figures in op_memory.peaks(case)}
    del room
    number = 48 * 48 * 4 / 1e6
    assert 64 * number <= figures["matmul", "forward"] <= 800 * number
    held, in_network = (
        figures["textbook", f"training step, R=3 (non-local: once){end}"] for end in ("", ", in a network")
    )
    assert held >= 4 * 64 * number and in_network >= 3 * 64 * number


def test_a_process_that_ends_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", os._exit)  # what the process begins with
    with pytest.raises(RuntimeError, match=r"the memory of 6x6 ended before .*--no-non-local"):
        op_memory.peaks(case_of(6))


def test_loops_are_of_the_layer_itself_where_it_has_them():
    """Which sees to what is held between them."""
    case = case_of(6)
    case.arguments.backends = ["compiled", "matmul"]
    loops = case.loops()
    for name in ("compiled", "compiled, recompute", "matmul"):
        assert loops[name].recurrence == 3 and not hasattr(loops[name], "module")
    assert loops["textbook"].recurrence == 3 and loops["textbook"].module.gamma.item() == 1
    assert loops["non-local"].attention is case.cores()["non-local"]


def test_a_step_in_a_network_is_a_step():
    case = case_of(6)
    loops = case.loops()
    step = case.steps_in_a_network(loops)
    alone = case.module_calls(loops, backward=True)
    for name, module in loops.items():
        got = step[name]()
        assert [g.shape for g in got] == [g.shape for g in alone[name]()]
        assert all(g.abs().sum() > 0 for g in got[:2]), name
        assert len(got) == 1 + len(list(module.parameters()))
