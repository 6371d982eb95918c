"""Processes that torchrun starts, and starts anew."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ccnet_d2.engine.torchrun import ElasticRun, TorchrunProcess, agree_on_round, joined_torchrun
from ccnet_d2.errors import UserError


def process(**changes) -> TorchrunProcess:
    values = dict(rank=0, world_size=1, local_rank=0, machine_rank=0, restarts=0, run_id="none", address="h")
    return TorchrunProcess(**{**values, **changes})


def test_torchrun_is_recognised(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert TorchrunProcess.from_environment() is None
    variables = dict(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, GROUP_RANK=2, MASTER_ADDR="h", MASTER_PORT=1)
    variables |= dict(TORCHELASTIC_RESTART_COUNT=3, TORCHELASTIC_RUN_ID="job")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert TorchrunProcess.from_environment() == TorchrunProcess(5, 8, 1, 2, 3, "job", "h")


class GoneOn(Exception):
    """The process would look for the others now."""


@pytest.mark.parametrize(
    ("device", "local_rank", "error", "words"),
    [
        ("cuda", 1, GoneOn, "^h$"),
        ("cuda", 2, UserError, "process 3 of this machine, but torch sees 2 GPUs"),
        ("cpu", 2, GoneOn, "^h$"),
    ],
)
def test_a_process_needs_a_gpu_of_its_own(monkeypatch, device, local_rank, error, words):
    def go_on(address):
        raise GoneOn(address)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("ccnet_d2.engine.torchrun.choose_interface", go_on)
    with pytest.raises(error, match=words), joined_torchrun(process(local_rank=local_rank), device):
        pass


def test_each_start_agrees_on_a_round_of_its_own_in_one_store():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rounds = []
    for processes in (3, 3, 2, 1, 4):  # started anew, then fewer, then more

        def agree(rank: int, processes: int = processes) -> str:
            store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
            return agree_on_round(store, rank, processes, timedelta(seconds=20))

        with ThreadPoolExecutor(processes) as pool:
            found = set(pool.map(agree, range(processes)))
        assert len(found) == 1
        rounds += found
    assert len(set(rounds)) == len(rounds)


def test_a_process_that_does_not_come():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TimeoutError, match="Process 0 of 2"):
        agree_on_round(store, 0, 2, timedelta(seconds=0.3))


def save(folder, name):
    (folder / "last_checkpoint").write_text(name)


def test_a_run_goes_on_after_a_restart_and_not_after_its_end(tmp_path):
    first = ElasticRun(process(run_id="job"), tmp_path)
    assert not first.is_restart()
    first.begin()
    save(tmp_path, "model_0000004.pth")
    for _ in range(2):  # started anew, twice, because a machine left, which torchrun does not count
        again = ElasticRun(process(run_id="job"), tmp_path)
        assert again.is_restart()
        again.begin()
    assert not ElasticRun(process(run_id="another"), tmp_path).is_restart()
    first.end()
    assert not ElasticRun(process(run_id="job"), tmp_path).is_restart()

    nameless = ElasticRun(process(), tmp_path)
    nameless.begin()
    save(tmp_path, "model_0000009.pth")
    assert not ElasticRun(process(), tmp_path).is_restart()
    assert ElasticRun(process(restarts=1), tmp_path).is_restart()


@pytest.mark.parametrize("run_id", ["job", "none"])
def test_a_restart_does_not_go_on_from_what_another_run_left(tmp_path, run_id):
    save(tmp_path, "model_final.pth")
    first = ElasticRun(process(run_id=run_id), tmp_path)
    assert not first.is_restart()
    first.begin()
    again = ElasticRun(process(run_id=run_id, restarts=1), tmp_path)
    assert not again.is_restart()  # it failed before it saved anything
    again.begin()
    time.sleep(0.01)
    save(tmp_path, "model_final.pth")  # of the same name, of this run
    assert ElasticRun(process(run_id=run_id, restarts=2), tmp_path).is_restart()


def test_a_restart_of_a_run_that_never_began(tmp_path):
    save(tmp_path, "model_final.pth")
    assert not ElasticRun(process(run_id="job", restarts=1), tmp_path).is_restart()
