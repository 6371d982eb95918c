"""Which checkpoints fit a model, and what may be different when it is named."""

import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ccnet_d2.checkpoint import CheckpointError, SafeCheckpointer, load_checkpoint
from tests.checkpoint.test_safe_checkpoints import Payload


class Net(nn.Module):
    """A backbone and a head."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(classes)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, classes, 1)

    def state(self, *without):
        return (
            {k: v for k, v in self.state_dict().items() if not k.startswith(without)}
            if without
            else self.state_dict()
        )


def load(tmp_path, weights, net=None, **options):
    path = tmp_path / "x.pth"
    torch.save({"model": weights}, path)
    net = net or Net()
    SafeCheckpointer(net, **options).load(str(path), checkpointables=[])
    return net


def test_missing_names_are_errors_unless_allowed(tmp_path):
    weights = Net(7).state("head")
    with pytest.raises(
        CheckpointError, match=r"lacks head\.bias, head\.weight; name .* train\.init_may_lack"
    ):
        load(tmp_path, weights, may_lack=[])
    with pytest.raises(CheckpointError, match=r"lacks head\.bias"):
        load(tmp_path, weights, may_lack=["head.w*", "backbone.*"])
    fresh = Net()
    net = load(tmp_path, weights, may_lack=["head.*"])
    assert torch.equal(net.head.weight, fresh.head.weight)
    assert torch.equal(net.backbone[0].weight, Net(7).backbone[0].weight)
    with pytest.raises(CheckpointError, match="lacks"):
        load(tmp_path, weights, may_lack=["*"], strict=True)


def test_norms_frozen_in_training_have_no_counter(tmp_path):
    # With the versions of its modules: batch norms that have none do without the counter.
    weights = Net(7).state()
    del weights["backbone.1.num_batches_tracked"]
    assert "num_batches_tracked" in str(Net(7).load_state_dict(weights, strict=False))
    net = load(tmp_path, weights, Net(), strict=True, may_differ=["head.*"])
    assert torch.equal(net.backbone[0].weight, Net(7).backbone[0].weight)


def test_other_shapes_are_errors_unless_allowed(tmp_path):
    weights = Net(7).state()
    with pytest.raises(
        CheckpointError, match=r"head\.\w+ has shape .* and 1 more differ.*train\.init_may_differ"
    ):
        load(tmp_path, weights)
    with pytest.raises(CheckpointError, match=r"head\.bias has shape \(7,\) there and \(5,\)"):
        load(tmp_path, weights, may_differ=["head.weight"])
    net = load(tmp_path, weights, may_differ=["head.*"], may_lack=[])
    assert torch.equal(net.head.weight, Net().head.weight)
    assert torch.equal(net.backbone[0].weight, Net(7).backbone[0].weight)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_integers_are_no_weights(tmp_path, prefix, dtype):
    """Detectron2 copies them into the parameters."""
    weights = {prefix + name: value for name, value in Net(7).state().items()}
    weights[f"{prefix}backbone.1.weight"] = torch.ones(4, dtype=dtype)
    net = Net(7)
    with pytest.raises(
        CheckpointError, match=rf"backbone\.1\.weight is of {dtype} there and of torch\.float32"
    ):
        load(tmp_path, weights, net)
    assert torch.equal(net.head.weight, Net(7).head.weight)
    # Where the shape may differ it is left out; in buffers integers count.
    weights[f"{prefix}backbone.1.weight"] = torch.ones(3, dtype=dtype)
    assert load(tmp_path, weights, Net(7), may_differ=["backbone.1.*"]).backbone[1].weight.eq(1).all()
    weights[f"{prefix}backbone.1.weight"] = torch.full((4,), 2.0, dtype=torch.float16)
    weights[f"{prefix}backbone.1.num_batches_tracked"] = torch.tensor(3)
    norm = load(tmp_path, weights, Net(7)).backbone[1]
    assert norm.weight.eq(2).all() and norm.num_batches_tracked == 3


def test_integers_are_those_of_integer_parameters(tmp_path):
    def net(value):
        return nn.ParameterDict({"steps": nn.Parameter(torch.full((2,), value), requires_grad=False)})

    assert load(tmp_path, net(3).state_dict(), net(0))["steps"].tolist() == [3, 3]


def test_integers_are_no_weights_where_names_are_matched(tmp_path):
    weights = {
        f"conv1_{kind}": np.ones(shape, np.uint8) for kind, shape in (("w", (4, 3, 1, 1)), ("b", (4,)))
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(weights))
    net = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1)})})})
    with pytest.raises(CheckpointError, match=r"stem\.conv1\.weight is of torch\.uint8"):
        load_checkpoint(net, tmp_path / "x.pkl", strict=False)


def test_buffers_count(tmp_path):
    weights = Net().state("backbone.1.running_mean")
    with pytest.raises(CheckpointError, match=r"lacks backbone\.1\.running_mean\.$"):
        load(tmp_path, weights, strict=True)


def save_run(tmp_path, net=None, **extra):
    net = net or Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    checkpointer = SafeCheckpointer(net, str(tmp_path), optimizer=optimizer, **extra)
    checkpointer.save("model_0000001", iteration=1)
    return checkpointer


def test_a_run_is_resumed_whole_or_not_at_all(tmp_path):
    checkpointer = save_run(tmp_path)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    # Only weights: no state to go on from, whatever may be missing.
    torch.save({"model": Net().state()}, tmp_path / "model_0000001.pth")
    with pytest.raises(CheckpointError, match=r"holds no 'optimizer', only weights.*train\.init_checkpoint="):
        checkpointer.resume_or_load("", resume=True)
    # Nor are the allowances for starting points for going on.
    save_run(tmp_path, Net(7))
    lenient = SafeCheckpointer(Net(), str(tmp_path), may_differ=["*"], may_lack=["*"])
    with pytest.raises(CheckpointError, match="has shape"):
        lenient.resume_or_load("", resume=True)
    torch.save({"model": Net().state("head")}, tmp_path / "model_0000001.pth")
    with pytest.raises(CheckpointError, match=r"lacks head\.bias, head\.weight\.$"):
        lenient.resume_or_load("", resume=True)
    assert lenient.may_differ == ("*",) and not lenient.strict


def test_no_code_runs_when_a_run_is_resumed(tmp_path):
    """Its own checkpoints need none, whatever the one that it started from did."""
    victim = tmp_path / "victim"
    save_run(tmp_path)
    torch.save({"model": Payload(victim)}, tmp_path / "model_0000001.pth")
    checkpointer = SafeCheckpointer(Net(), str(tmp_path), allow_pickle=True)
    with pytest.raises(CheckpointError, match="would run code"):
        checkpointer.resume_or_load("", resume=True)
    assert not victim.exists() and checkpointer.allow_pickle


def test_an_older_checkpoint_is_named_where_the_last_is_damaged_and_only_there(tmp_path):
    checkpointer = save_run(tmp_path)
    for number, written in ((3, 100), (2, 200), (4, 300)):  # the numbers do not say which is newer
        checkpointer.save(f"model_000000{number}")
        os.utime(tmp_path / f"model_000000{number}.pth", (written, written))
    os.utime(tmp_path / "model_0000001.pth", (0, 0))
    last = tmp_path / "model_0000004.pth"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1000])
    os.utime(last, (300, 300))
    with pytest.raises(
        CheckpointError, match=r"an older one, such as \S+/model_0000002\.pth, write its name into"
    ):
        checkpointer.resume_or_load("", resume=True)
    last.write_bytes(whole)
    other = SafeCheckpointer(Net(7), str(tmp_path))
    with pytest.raises(CheckpointError, match="has shape") as told:
        other.resume_or_load("", resume=True)
    assert "an older one" not in str(told.value)


@pytest.mark.parametrize("name", ["../elsewhere.pth", "/etc/passwd", "a\0.pth", "", "\n", "two\nlines"])
def test_a_tag_names_a_file_beside_it(tmp_path, name):
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(
        CheckpointError, match=r"last_checkpoint holds .*, which is not the name of a checkpoint"
    ):
        SafeCheckpointer(Net(), str(tmp_path)).resume_or_load("", resume=True)


def test_a_tag_written_by_hand_may_end_its_line(tmp_path):
    checkpointer = save_run(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}


def test_without_a_checkpoint_nothing_is_loaded_or_said(tmp_path, caplog):
    net = Net()
    nn.init.constant_(net.head.bias, float("nan"))
    assert SafeCheckpointer(net, optimizer=torch.optim.SGD(net.parameters(), 0.1)).load("") == {}
    assert "NaN" not in caplog.text


def test_errors_of_the_machine_are_none_of_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(DetectionCheckpointer, "load", full)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        load(tmp_path, Net().state())


def test_names_that_the_model_does_not_have_are_told(tmp_path, caplog):
    load(tmp_path, {**Net().state(), "decoder.weight": torch.zeros(1)})
    assert "not used by the model" in caplog.text and "decoder" in caplog.text


def test_state_that_does_not_fit(tmp_path):
    save_run(tmp_path)
    net = Net()
    other = torch.optim.SGD([{"params": [p]} for p in net.parameters()], 0.1)
    with pytest.raises(
        CheckpointError, match=r"'optimizer' in checkpoint .*model_0000001\.pth does not fit this run"
    ):
        SafeCheckpointer(net, str(tmp_path), optimizer=other).resume_or_load("", resume=True)

    class Broken:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise KeyError("place")

    with pytest.raises(CheckpointError, match="there is no 'place'"):
        SafeCheckpointer(net, str(tmp_path), optimizer=Broken()).resume_or_load("", resume=True)


def test_a_missing_last_checkpoint(tmp_path):
    checkpointer = save_run(tmp_path)
    (tmp_path / "model_0000001.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"last_checkpoint names .*model_0000001\.pth, which is not there"
    ):
        checkpointer.resume_or_load("", resume=True)
    # Without --resume it does not matter.
    assert checkpointer.resume_or_load("", resume=False) == {}


def test_nothing_is_written_without_a_folder_or_by_other_processes(tmp_path):
    SafeCheckpointer(Net()).save("model")
    SafeCheckpointer(Net(), str(tmp_path), save_to_disk=False).save("model")
    assert not list(tmp_path.iterdir())
    assert SafeCheckpointer(Net(), str(tmp_path)).get_checkpoint_file() == ""


def test_caffe2_and_pycls_files(tmp_path):
    net = Net()
    arrays = {key: value.numpy() for key, value in net.state_dict().items()}
    path = tmp_path / "caffe2.pkl"
    path.write_bytes(pickle.dumps({"blobs": {**arrays, "head.weight_momentum": np.zeros(1)}}))
    data = SafeCheckpointer(Net())._load_file(str(path))
    assert data["__author__"] == "Caffe2" and set(data["model"]) == set(arrays)
    # With the weights under "model" they are Detectron2's, whether or not it says who wrote them.
    path.write_bytes(pickle.dumps({"model": arrays}))
    other = Net(5)
    nn.init.zeros_(other.head.weight)
    load_checkpoint(other, path)
    assert torch.equal(other.head.weight, net.head.weight)
    path = tmp_path / "pycls.pyth"
    torch.save({"model_state": net.state_dict()}, path)
    other = Net(5)
    nn.init.zeros_(other.head.weight)
    load_checkpoint(other, path)
    assert torch.equal(other.head.weight, net.head.weight)
    torch.save({"weights": net.state_dict()}, path)
    with pytest.raises(CheckpointError, match="no 'model_state'"):
        load_checkpoint(other, path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_caffe2_are_detectron2s(tmp_path, wrapped):
    """An ImageNet model holds its arrays as they are, a detection model under "blobs"."""
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3, 1, 1)
    arrays = {"conv1_w": kernel, "conv1_w_momentum": np.zeros_like(kernel)}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": arrays} if wrapped else arrays))
    stem = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1, bias=False)})
    net = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": stem})})
    load_checkpoint(net, path)
    np.testing.assert_array_equal(stem["conv1"].weight.detach().numpy(), kernel)


def test_names_of_pycls_are_matched_by_their_ends(tmp_path):
    source, net = Net(7), Net()
    torch.save({"model_state": source.backbone.state_dict()}, tmp_path / "x.pyth")
    load_checkpoint(net, tmp_path / "x.pyth", strict=False)
    assert torch.equal(net.backbone[0].weight, source.backbone[0].weight)


def test_no_checkpoint_at_all_is_an_error():
    with pytest.raises(CheckpointError, match=r"No checkpoint given: name one with train\.init_checkpoint"):
        load_checkpoint(Net(), "")


def test_names_are_matched_by_their_ends_where_the_path_says_so(tmp_path):
    path = tmp_path / "backbone.pth"
    source = Net(7)
    torch.save(source.backbone.state_dict(), path)
    net = Net()
    checkpointer = SafeCheckpointer(net)
    checkpointer.load(f"{path}?matching_heuristics=True")
    assert torch.equal(net.backbone[0].weight, source.backbone[0].weight)
    with pytest.raises(CheckpointError, match="no parameter"):
        checkpointer.load(str(path))


def test_a_file_in_the_home_directory(tmp_path, monkeypatch):
    """As images, exports and data sets may be; from Python and in yacs configs a ~ comes here as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(Net(7).backbone.state_dict(), tmp_path / "x.pth")
    net = Net()
    SafeCheckpointer(net).load("~/x.pth?matching_heuristics=True")
    assert torch.equal(net.backbone[0].weight, Net(7).backbone[0].weight)


@pytest.mark.parametrize("url", ["https://127.0.0.1:9/x.pth", "catalog://nothing"])
def test_what_cannot_be_fetched(url):
    with pytest.raises(CheckpointError, match="cannot be had"):
        load_checkpoint(Net(), url)


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_file_is_told_with_what_can_be_done(tmp_path, strict):
    """Where all weights are needed, random ones are none, and none may differ."""
    for path, what in ((tmp_path, "it is a folder"), (tmp_path / "nothing", "there is no such file")):
        with pytest.raises(CheckpointError, match=f"{path} cannot be had: {what}; name a local file") as told:
            SafeCheckpointer(Net(), strict=strict).load(str(path))
        assert ("random weights" in str(told.value)) is not strict
    with pytest.raises(CheckpointError, match="has shape") as told:
        load(tmp_path, Net(7).state(), strict=strict)
    assert ("init_may_differ" in str(told.value)) is not strict


def test_weights_that_are_not_finite_are_named(tmp_path, caplog):
    weights = Net(7).state()
    weights["head.weight"][0, 0] = float("nan")
    weights["backbone.1.running_var"][1] = float("inf")
    load(tmp_path, weights, Net(7))
    assert f"With checkpoint {tmp_path / 'x.pth'}, 2 of the model's 9 tensors hold NaN or Inf" in caplog.text
    assert "backbone.1.running_var, head.weight. " in caplog.text


def test_finite_weights_are_loaded_without_a_word(tmp_path, caplog):
    load(tmp_path, Net(7).state(), Net(7))
    assert "NaN" not in caplog.text
    # Those of other shapes are not loaded, and so are not the model's.
    weights = {**Net(7).state(), "head.bias": torch.full((3,), float("nan"))}
    load(tmp_path, weights, Net(7), may_differ=["head.bias"])
    assert "NaN" not in caplog.text
