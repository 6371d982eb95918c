"""convert_checkpoint.py: from a published file to a checkpoint, with its report or one sentence."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from ccnet_d2.checkpoint import CheckpointError
from tests.checkpoint.test_convert import Payload
from tests.scripts import PROJECT, load_script

SCRIPT = PROJECT / "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def script():
    return load_script("tools/convert_checkpoint.py")


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.mark.parametrize("layout", ["auto", "torchvision", "timm"])
def test_report_and_file(script, resnet18, tmp_path, capsys, layout):
    target = tmp_path / "new/folder/out.pth"
    assert script.main([str(resnet18), str(target), "--from", layout, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert f"ResNet-18, basic stem ({'timm' if layout == 'timm' else 'torchvision'} layout)" in out
    assert "unused   fc.weight, fc.bias (the ImageNet classifier)" in out and "missing  none" in out
    assert "layer2.0.downsample.1.running_var -> backbone.res3.0.shortcut.norm.running_var" in out
    assert len(torch.load(target, weights_only=True)["model"]) == 120
    assert script.main([str(resnet18), str(target), "--from", layout]) == 0
    assert "layer2.0.downsample.1.running_var" not in capsys.readouterr().out


def test_a_run_that_the_weights_have_to_fit(script, resnet18, tmp_path, capsys):
    run = ["--config-file", "camvid/ccnet_R_18_D8_half.py"]
    assert script.main([str(resnet18), str(tmp_path / "a.pkl"), *run]) == 0
    assert "__author__" in pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert (
        script.main([str(resnet18), str(tmp_path / "b.pth"), *run, "--opts", "model.backbone.depth=34"]) == 1
    )
    assert "cannot be made from them" in capsys.readouterr().err
    assert not (tmp_path / "b.pth").exists()


def test_one_sentence(script, resnet18, tmp_path, capsys):
    torch.save({"x": Payload(tmp_path / "victim")}, tmp_path / "evil.pth")
    for source, more, sentence in (
        (tmp_path / "nowhere.pth", [], "nowhere.pth does not exist"),
        (tmp_path / "evil.pth", [], "--allow-pickle converts it all the same"),
        (resnet18, ["--from", "mmseg"], "torchvision layout, not mmseg"),
        (resnet18, ["--config-file", "nothing.py"], "no config 'nothing.py'"),
    ):
        assert script.main([str(source), str(tmp_path / "out.pth"), *more]) == 1
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "victim").exists() and not (tmp_path / "out.pth").exists()
    with pytest.raises(SystemExit):
        script.parse([str(resnet18), "x.pth", "--opts", "a=1"])
    assert "there is no --config-file" in capsys.readouterr().err


def test_trusted_code_is_run_if_asked_for(script, tmp_path, capsys):
    weights = torchvision.models.resnet18().state_dict()
    torch.save({"state_dict": weights, "meta": Payload(tmp_path / "trace")}, tmp_path / "trusted.pth")
    arguments = [str(tmp_path / "trusted.pth"), str(tmp_path / "out.pth")]
    assert script.main(arguments) == 1 and not (tmp_path / "trace").exists()
    assert script.main([*arguments, "--allow-pickle"]) == 0 and (tmp_path / "trace").exists()


@pytest.mark.parametrize("flags", [[], ["--without-classifier"]])
def test_the_classifier_is_left_out_only_where_asked(script, monkeypatch, flags):
    given = []

    def convert(*_, classifier, **__):
        given.append(classifier)
        raise CheckpointError("enough.")

    monkeypatch.setattr(script, "convert_file", convert)
    assert script.main(["a.pth", "b.pth", *flags]) == 1
    assert given == [not flags]


@pytest.mark.slow
def test_as_a_command(tmp_path, resnet18):
    command = [sys.executable, str(SCRIPT), str(resnet18), str(tmp_path / "out.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written to {tmp_path / 'out.pth'}\n")
