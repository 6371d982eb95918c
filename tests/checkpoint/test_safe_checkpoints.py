"""Checkpoints are data: nothing in them runs, and what does not fit is an error."""

import errno
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ccnet_d2.checkpoint import CheckpointError, SafeCheckpointer, load_checkpoint, load_file
from ccnet_d2.checkpoint.convert.write import write_checkpoint
from ccnet_d2.checkpoint.safe_load import check_weights


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_code_in_a_file_is_not_run(tmp_path, suffix):
    victim, path = tmp_path / "victim", tmp_path / f"evil{suffix}"
    data = {"model": {"0.weight": Payload(victim)}}
    if suffix == ".pth":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match="evil"):
        load_checkpoint(model(), path)
    assert not victim.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("numpy_version", [1, 2])
def test_detectron2_pickles_load(tmp_path, protocol, numpy_version):
    path = tmp_path / "zoo.pkl"
    weights = {k: v.numpy() for k, v in model().state_dict().items()}
    weights["1.bias"] = weights["1.bias"][::-1]
    weights["0.weight"] = np.asfortranarray(weights["0.weight"] + 1)
    content = pickle.dumps({"model": weights, "__author__": "test"}, protocol=protocol)
    if numpy_version == 1:
        if protocol > 2:  # a frame says how long it is; there need not be one
            assert content[2:3] == b"\x95"
            content = content[:2] + content[11:]
        # The length of a name stands before it; protocol 2 ends it with a line instead.
        content = content.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
        content = content.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
        content = content.replace(b"cnumpy._core.", b"cnumpy.core.")
        assert b"_core" not in content
    path.write_bytes(content)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    load_checkpoint(net, path)
    np.testing.assert_array_equal(net[0].weight.detach().numpy(), weights["0.weight"])


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_damaged_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="broken"):
        load_file(path)


def test_programs_are_told_as_what_they_are(tmp_path):
    """They are whole; and those of torch.export are what this project itself makes of a run."""
    path = tmp_path / "program.pth"
    torch.jit.save(torch.jit.trace(model().eval(), torch.zeros(1, 3, 2, 2)), path)
    with pytest.raises(
        CheckpointError, match=r"program\.pth is a program of TorchScript, not a state dict; name"
    ):
        load_file(path)
    torch.export.save(
        torch.export.export(model().eval(), (torch.zeros(1, 3, 2, 2),)), tmp_path / "program.pt2"
    )
    with pytest.raises(
        CheckpointError, match=r"program\.pt2 is a program of torch\.export, not a state dict; name"
    ):
        load_file(tmp_path / "program.pt2")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(CheckpointError, match=r"old\.pt2 is a program of torch\.export"):
        load_file(tmp_path / "old.pt2")


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({"model": model().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read"):
        load_file(path)


def test_a_failure_does_not_stand_in_the_way_of_the_next_file(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"hello")
    torch.save({"model": model().state_dict()}, tmp_path / "whole.pth")
    checkpointer = SafeCheckpointer(model())
    with pytest.raises(CheckpointError, match=r"broken\.pth cannot be read"):
        checkpointer.load(str(tmp_path / "broken.pth"))
    checkpointer.load(str(tmp_path / "whole.pth"))


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
        np.array(["a"]),
        np.array([None]),
        "a",
    ],
    ids=["meta", "sparse", "text", "objects", "a text"],
)
def test_what_is_no_array_of_numbers_is_named(value):
    weights = {"fine": torch.ones(2), "also": np.ones(2, np.float16), "layer.weight": value}
    with pytest.raises(
        CheckpointError, match=r"^Checkpoint x\.pth holds \w+ at 'layer\.weight', where an array of"
    ):
        check_weights(weights, "x.pth")


def test_a_file_of_torch_may_be_named_as_a_pickle(tmp_path):
    source, net = model(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.save({"model": source.state_dict()}, tmp_path / "x.pkl")
    load_checkpoint(net, tmp_path / "x.pkl")
    assert torch.equal(net[0].weight, source[0].weight)


def test_checkpoints_are_written_into_new_folders(tmp_path):
    weights = {"weight": torch.arange(3.0)}
    for name in ("a/b/x.pth", "c/d/x.pkl"):
        write_checkpoint(weights, tmp_path / name, "somebody")
        data = load_file(tmp_path / name)
        assert data["__author__"] == "somebody" and data["model"]["weight"].tolist() == [0, 1, 2]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        load_checkpoint(model(), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("load", [load_file, partial(load_checkpoint, model())])
def test_a_file_that_may_not_be_read_is_named_with_the_reason(tmp_path, monkeypatch, load):
    path = tmp_path / "secret.pth"
    torch.save({"model": model().state_dict()}, path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:  # root may read everything
        patched.setattr(Path, "open", refuse)
        with pytest.raises(
            CheckpointError, match=r"^Checkpoint \S+/secret\.pth cannot be read: Permission denied\.$"
        ):
            load(path)
    load(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^Checkpoint {tmp_path} does not exist as a file\.$"):
        load_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"/x\.pth does not exist\.$"):
        load_file(tmp_path / "x.pth")


def test_a_name_that_is_too_long_for_the_disk():
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read: File name too long\.$"):
        load_file("x" * 300 + ".pth")


def test_wrong_shape_is_an_error(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 5, 1)).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"shape \(5,.*\(4,"):
        load_checkpoint(model(), path, strict=False)


def test_missing_parameters_are_an_error_when_strict(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": model()[:1].state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"lacks 1\."):
        load_checkpoint(model(), path)
    load_checkpoint(model(), path, strict=False)


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.pyth", "x.pth?matching_heuristics=True"])
def test_a_file_without_weights_is_named(tmp_path, name):
    path = tmp_path / name.partition("?")[0]
    content = {"model_state": {}} if path.suffix == ".pyth" else {"model": {}, "__author__": "x"}
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"^Checkpoint {path} holds no weights\.$"):
        load_checkpoint(model(), tmp_path / name, strict=False)


def test_a_file_of_another_code_base_is_to_be_converted(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"epoch": 3, "state_dict": dict(model().state_dict())}, path)
    with pytest.raises(
        CheckpointError, match=r"holds not weights but a dict at 'state_dict': .*convert_checkpoint\.py\.$"
    ):
        load_checkpoint(model(), path)
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"no parameter has .*; .*convert_checkpoint\.py\.$"):
        load_checkpoint(model(), path)


def test_nothing_in_common_is_an_error_always(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"other.weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="no parameter"):
        load_checkpoint(model(), path, strict=False)


def test_saved_checkpoint_comes_back(tmp_path):
    source = model()
    SafeCheckpointer(source, str(tmp_path)).save("model_final", iteration=7)
    target = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    extra = SafeCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)
    assert extra["iteration"] == 7
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
