"""The hooks that save, on a trainer that does nothing."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
from torch import nn

from ccnet_d2.checkpoint import SafeCheckpointer
from ccnet_d2.data.bad_samples import BadSamples
from ccnet_d2.engine import saving
from ccnet_d2.engine.saving import STOPPED_STATUS, ReportBadSamples, SaveCheckpoints


@pytest.fixture
def hook(tmp_path):
    """Saves every iteration to the folder "run", and keeps two files."""
    (tmp_path / "run").mkdir()
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(tmp_path / "run"))
    hook = SaveCheckpoints(checkpointer, period=1, max_to_keep=2)
    hook.trainer = SimpleNamespace(iter=0, max_iter=100, gather_process_states=lambda: None)
    return hook


def save_after(hook, *iterations):
    for hook.trainer.iter in iterations:
        hook.after_step()


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "run").glob("*.pth"))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_files_elsewhere_stay_whatever_a_checkpoint_says(hook, tmp_path):
    """It may have come from someone else."""
    outside = tmp_path / "outside.pth"
    outside.touch()
    hook.load_state_dict({"recent": ["../outside.pth", str(outside)]})
    save_after(hook, 1, 2, 3)
    assert outside.exists() and files(tmp_path) == ["model_0000002.pth", "model_0000003.pth"]


def test_a_file_that_is_written_again_counts_once(hook, tmp_path):
    save_after(hook, 1, 2, 2)
    assert files(tmp_path) == ["model_0000001.pth", "model_0000002.pth"]


def test_sigterm_right_before_an_evaluation(hook, tmp_path):
    with hook.listening(), pytest.raises(SystemExit) as stopped:
        terminate()
        with hook.interruptible():
            pytest.fail("it evaluated")
    assert stopped.value.code == STOPPED_STATUS
    assert files(tmp_path) == ["model_0000000.pth"]


def test_sigterm_after_an_evaluation_waits_for_the_end_of_the_step(hook, tmp_path):
    """In the middle of one, weights and optimizer do not belong together."""
    with hook.listening():
        with hook.interruptible():
            pass
        terminate()
        assert not files(tmp_path)
        with pytest.raises(SystemExit):
            save_after(hook, 5)
    assert files(tmp_path) == ["model_0000005.pth"]


def test_sigterm_does_not_interrupt_the_evaluation_of_several_processes(hook, monkeypatch):
    """The others may not have been told, and would wait."""
    monkeypatch.setattr(saving.comm, "get_world_size", lambda: 2)
    reached = []
    with hook.listening(), hook.interruptible():
        terminate()
        reached.append("the end")
    assert reached


@pytest.mark.parametrize(("rank", "name"), [(0, "bad_samples.json"), (3, "bad_samples_rank3.json")])
def test_each_process_reports_its_bad_samples(tmp_path, monkeypatch, rank, name):
    monkeypatch.setattr(saving.comm, "get_rank", lambda: rank)
    ReportBadSamples(BadSamples("skip", 5), str(tmp_path)).after_train()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert json.loads((tmp_path / name).read_text()) == []


def test_nothing_is_reported_where_bad_samples_stop_the_run(tmp_path):
    ReportBadSamples(BadSamples("stop", 5), str(tmp_path)).after_train()
    assert not list(tmp_path.iterdir())
