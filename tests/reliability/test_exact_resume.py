"""A run that was interrupted and resumed ends with the very bits of one that was not."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from ccnet_d2.engine import training
from ccnet_d2.engine.saving import STOPPED_STATUS
from ccnet_d2.engine.trainer import Trainer


def assert_equal(a, b, where="") -> None:
    """All tensors and values in two nests are the same, bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def final(folder: Path) -> dict:
    """What the run ended with; the list of files differs where one stopped in between."""
    data = torch.load(folder / "model_final.pth", weights_only=True)
    data["trainer"]["hooks"].pop("SaveCheckpoints")
    return data


def stop_after(monkeypatch: pytest.MonkeyPatch, iteration: int, action) -> None:
    """Have `action` happen in the middle of a step."""
    run_step = Trainer.run_step

    def interrupted(self):
        run_step(self)
        if self.iter == iteration:
            action()

    monkeypatch.setattr(Trainer, "run_step", interrupted)


class Crash(Exception):
    """What the program does not expect."""


def crash():
    raise Crash


@pytest.mark.parametrize("workers", [(0, 0, 0), (0, 2, 1)])
def test_after_a_crash(run, tmp_path, monkeypatch, workers):
    def on(number):
        return f"dataloader.train.num_workers={workers[number]}"

    assert run(on(0), output="whole")[0] == 0
    with monkeypatch.context() as context, pytest.raises(Crash):
        stop_after(context, 10, crash)
        run(on(1), output="parts")
    with monkeypatch.context() as context, pytest.raises(Crash):
        stop_after(context, 17, crash)
        run("--resume", on(2), output="parts")
    assert run("--resume", on(1), output="parts")[0] == 0
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]


def test_metrics_go_on_after_a_crash(run, tmp_path, monkeypatch):
    """Also where iterations that were logged are done again, and where a run starts anew in a folder."""
    assert run("train.log_period=1", output="whole")[0] == 0
    with monkeypatch.context() as context, pytest.raises(Crash):
        stop_after(context, 10, crash)
        run("train.log_period=1", output="parts")
    assert logged(tmp_path / "parts")[-1] == 10  # logged, but the last checkpoint is of iteration 7
    assert run("--resume", "train.log_period=1", output="parts")[0] == 0
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole") == [*range(25)]
    assert run("train.log_period=1", "train.max_iter=4", output="parts")[0] == 0
    assert logged(tmp_path / "parts") == [*range(5)]


def test_evaluations_and_other_optimizers(run, tmp_path, monkeypatch):
    """Evaluating in between, on which the crash falls, and SGD with momentum in bf16 with clipping."""
    options = [
        "train.eval_period=6",
        "train.amp.enabled=True",
        "train.clip_grad_norm=0.5",
        "optimizer._target_=torch.optim.SGD",
        "optimizer.lr=0.01",
        "+optimizer.momentum=0.9",
        "train.max_iter=10",
    ]
    evaluate = training._evaluate_on

    def drawing(*arguments):
        torch.rand(3)  # as evaluators may
        return evaluate(*arguments)

    monkeypatch.setattr(training, "_evaluate_on", drawing)
    assert run(*options, output="whole")[0] == 0
    with monkeypatch.context() as context, pytest.raises(Crash):
        context.setattr(training, "_evaluate_on", lambda *arguments: crash())
        run(*options, output="parts")
    assert (tmp_path / "parts/last_checkpoint").read_text() == "model_0000003.pth"
    assert run("--resume", *options, output="parts")[0] == 0
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_sigterm_saves_and_ends(run, tmp_path, monkeypatch):
    assert run(output="whole")[0] == 0
    with monkeypatch.context() as context, pytest.raises(SystemExit) as stopped:
        stop_after(context, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(output="parts")
    assert stopped.value.code == STOPPED_STATUS == 143
    assert (tmp_path / "parts/last_checkpoint").read_text() == "model_0000009.pth"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run("--resume", output="parts")[0] == 0
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))
    lines = logged(tmp_path / "parts")
    assert lines == sorted(set(lines))


def test_sigterm_to_all_processes_of_the_run(run, tmp_path, monkeypatch):
    """As `timeout` and job schedulers send it: loader workers get it too, and may get it first."""

    others = {process.pid for process in multiprocessing.active_children()}  # of tests before

    def to_all():
        workers = [worker for worker in multiprocessing.active_children() if worker.pid not in others]
        assert len(workers) == 2
        # From another process: a worker ends when its parent tells it to.
        pids = " ".join(str(worker.pid) for worker in workers)
        subprocess.run(["sh", "-c", f"kill -TERM {pids}"], check=True)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as context, pytest.raises(SystemExit) as stopped:
        stop_after(context, 9, to_all)
        pytest.fail(f"the run was not stopped: {run('dataloader.train.num_workers=2')}")
    assert stopped.value.code == STOPPED_STATUS
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_0000009.pth"


def test_sigterm_during_an_evaluation(run, tmp_path, monkeypatch):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    monkeypatch.setattr(training, "_evaluate_on", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run("train.eval_period=6")
    assert stopped.value.code == STOPPED_STATUS
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_0000005.pth"


def test_sigterm_during_the_last_evaluation(run, tmp_path, monkeypatch):
    """The weights are there; --resume then evaluates them, once."""
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr(training, "_evaluate_on", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
        run("train.max_iter=4")
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_final.pth"
    assert not (tmp_path / "output/evaluation.json").exists()
    assert run("--resume", "train.max_iter=4")[0] == 0
    assert "mIoU" in json.loads((tmp_path / "output/evaluation.json").read_text())["sem_seg"]
    assert "Nothing to train" in run("--resume", "train.max_iter=4")[1]


def test_old_files_go_and_none_is_left_over(run, tmp_path, monkeypatch):
    output = tmp_path / "output"
    output.mkdir()
    (output / "model_0000007.pth.0123abcd.tmp").write_bytes(b"of a process that was killed")
    (output / "model_elsewhere.pth").write_bytes(b"not ours")
    keep = "train.checkpointer.max_to_keep=2"
    with monkeypatch.context() as context, pytest.raises(Crash):
        stop_after(context, 13, crash)
        run(keep)
    assert run("--resume", keep)[0] == 0
    assert sorted(path.name for path in output.glob("*.pth*")) == [
        "model_0000015.pth",
        "model_0000019.pth",
        "model_elsewhere.pth",
        "model_final.pth",
    ]


def test_a_hook_that_draws_changes_nothing(run, tmp_path, monkeypatch):
    class Draws(HookBase):
        def after_step(self):
            torch.rand(self.trainer.iter + 1)

    assert run("train.max_iter=8", output="a")[0] == 0
    register = Trainer.register_hooks
    monkeypatch.setattr(Trainer, "register_hooks", lambda self, hooks: register(self, [*hooks, Draws()]))
    assert run("train.max_iter=8", output="b")[0] == 0
    assert_equal(final(tmp_path / "a"), final(tmp_path / "b"))
