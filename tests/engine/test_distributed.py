"""What a process asks of the others, with answers given here; real ones are in test_launch.py."""

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import defaults
from torch import nn

from ccnet_d2.engine import distributed
from ccnet_d2.engine.distributed import (
    any_process,
    check_batch_size,
    check_same_start,
    copy_buffers_from_main_process,
    detectron2_shares_models,
    is_lost_connection,
    share_model,
)
from ccnet_d2.errors import UserError
from ccnet_d2.layers.sync_batch_norm import CPUSyncBatchNorm


@pytest.fixture
def answers(monkeypatch):
    """Sets what all processes answer."""

    def set_answers(*values):
        monkeypatch.setattr(distributed.comm, "get_world_size", lambda: len(values))
        monkeypatch.setattr(distributed.comm, "all_gather", lambda own: list(values))

    return set_answers


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"), True),
        (
            RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"),
            True,
        ),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistBackendError("remote process exited or there was a network error"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (dist.DistStoreError("wait timeout after 1800000ms"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (KeyError("gloo"), False),
    ],
)
def test_errors_that_another_process_caused(error, lost):
    assert is_lost_connection(error) is lost


def test_one_process_is_enough(answers):
    answers(False, True, False)
    assert any_process(False) is True
    answers(False, False)
    assert any_process(False) is False


def test_a_batch_is_split_evenly(answers):
    answers(0, 0, 0)
    check_batch_size(6)
    check_batch_size(None)
    with pytest.raises(UserError, match=r"^SOLVER\.IMS_PER_BATCH 8 .* over 3: make it a multiple of 3\.$"):
        check_batch_size(8, "SOLVER.IMS_PER_BATCH")


def test_processes_that_see_other_checkpoints(answers):
    answers(40, 40)
    check_same_start(40, "out")
    answers(40, 40, 0)
    with pytest.raises(
        UserError, match=r"^Process 0 goes on from iteration 40 and process 2 from iteration 0: .* out must"
    ):
        check_same_start(40, "out")


def test_detectron2_has_its_own_function_again():
    theirs = defaults.create_ddp_model
    with pytest.raises(ZeroDivisionError), detectron2_shares_models():
        assert defaults.create_ddp_model is share_model
        raise ZeroDivisionError
    assert defaults.create_ddp_model is theirs is not share_model


def test_how_a_model_is_shared(answers, monkeypatch):
    asked = []
    monkeypatch.setattr(
        distributed, "_create_ddp_model", lambda model, **options: asked.append(options) or model
    )
    answers(None)
    model = nn.Sequential(nn.SyncBatchNorm(3))
    assert share_model(model) is model and type(model[0]) is nn.SyncBatchNorm and not asked
    answers(None, None)
    share_model(model.to("meta"))  # any device but the CPU: the process's own GPU, and torch's batch norm
    assert type(model[0]) is nn.SyncBatchNorm and asked.pop() == {"fp16_compression": False}
    share_model(model.to_empty(device="cpu"), fp16_compression=True, find_unused_parameters=True)
    assert type(model[0]) is CPUSyncBatchNorm
    assert asked == [{"fp16_compression": True, "find_unused_parameters": True, "device_ids": None}]


def test_buffers_become_those_of_the_main_process(answers, monkeypatch):
    def make_model(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        model.register_buffer("transposed", torch.randn(4, 3).mT)  # backends refuse what has gaps
        model(torch.randn(5, 2, 4, 4))
        return model

    def broadcast(values, src):
        assert src == 0 and values.is_contiguous()
        values.copy_(sent.pop(0))

    main, here, before = make_model(0), make_model(1), make_model(1)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    sent = list(main.buffers())
    answers(None)
    copy_buffers_from_main_process(here)
    assert len(sent) == 4
    answers(None, None)
    copy_buffers_from_main_process(here)
    assert not sent
    for name, value in here.state_dict().items():
        expected = main if name in dict(main.named_buffers()) else before
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=0)
