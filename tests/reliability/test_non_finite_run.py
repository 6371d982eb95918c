"""A run whose loss explodes: what train_net.py says, and what the tool makes of the file that it wrote."""

from pathlib import Path

import torch

import replay_non_finite
from ccnet_d2.checkpoint import SafeCheckpointer, load_file
from ccnet_d2.engine import trainer

SMALL_RUN = str(Path(__file__).with_name("small_run.py"))


def test_it_is_explained_and_repeated(run, tmp_path, capsys):
    status, error = run("optimizer.lr=1e30", "train.checkpointer.period=1")
    assert status == 1 and "not finite at iteration" in error and "train_0000" in error
    (path,) = (tmp_path / "output/non_finite").iterdir()
    assert str(path) in error
    # No checkpoint holds weights that are not finite.
    last = load_file(SafeCheckpointer(torch.nn.Module(), str(tmp_path / "output")).get_checkpoint_file())
    assert all(bool(torch.isfinite(value).all()) for value in last["model"].values())

    assert replay_non_finite.main(["--config-file", SMALL_RUN, str(path)]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert printed["then"] == printed["now"] and printed["then"] in error
    assert replay_non_finite.main(["--config-file", SMALL_RUN, str(tmp_path / "none.pth")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_state_of_retries_is_saved(run, tmp_path, monkeypatch):
    """One bad moment of the gradients: dropped, and known to a resumed run."""
    calls = []
    look_finite = trainer.gradients_look_finite

    def once(model):
        calls.append(1)
        return look_finite(model) & (len(calls) != 3)

    monkeypatch.setattr(trainer, "gradients_look_finite", once)
    monkeypatch.setattr(trainer, "gradients_are_finite", lambda model: False)
    assert run("train.max_iter=6", "train.non_finite_retries=1")[0] == 0
    state = load_file(tmp_path / "output/model_final.pth")["trainer"]
    assert state["batches_dropped"] == 1
    assert state["processes"][0]["data"]["batches"] == 7
