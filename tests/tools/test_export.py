"""export.py: the file it writes and what it prints."""

import json
import re

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from ccnet_d2.model_zoo import get_config
from tests.scripts import load_script

TOY = "toy/ccnet_synthetic.py"


@pytest.fixture(scope="module")
def script():
    return load_script("tools/export.py")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = instantiate(get_config(TOY).model).eval()
    model.sem_seg_head.context.gamma.data.fill_(0.7)
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.mark.slow
def test_an_onnx_file_is_written_checked_and_described(script, model, weights, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "new" / "toy.onnx"
    given = ["--config-file", TOY, "--checkpoint", weights, "--output", str(path)]
    assert script.main([*given, "--check", "1x48x48", "2x33x57", "1x40x90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["1x3x48x48", "2x3x33x57", "1x3x40x90"]
    found = re.fullmatch(r"(.+) written, (.+) MB; largest difference from PyTorch (.+)", lines[3])
    assert found[1] == str(path) and float(found[2]) == pytest.approx(path.stat().st_size / 1e6, abs=0.05)
    assert float(found[3]) <= 1e-4
    assert [file.name for file in path.parent.iterdir()] == ["toy.onnx"]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert about["input_format"] == "RGB" and len(json.loads(about["classes"])) == 4
    image = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)
    with torch.no_grad():
        expected = model([{"image": image, "height": 40, "width": 52}])[0]["sem_seg"].numpy()
    (logits,) = session.run(None, {"images": image[None].float().numpy()})
    assert np.abs(logits[0] - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"--output": "toy.h5"}, 1, "'toy.h5' must end in .onnx or .pt2"),
        ({"--config-file": "coco/mask_rcnn_rcca_R_50_FPN_1x.py"}, 1, "GeneralizedRCNN does not export"),
        ({"--checkpoint": "none.pth"}, 1, "none.pth"),
        ({"--check": "48x48"}, 2, "'48x48' is not BATCHxHEIGHTxWIDTH"),
        ({"--check": "1x8x48"}, 1, "sides of at least 32"),
        pytest.param(
            {"--tolerance": "1e-12"},
            1,
            "nothing was written: the file would not compute what the model computes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    script, weights, tmp_path, monkeypatch, capsys, change, status, message
):
    monkeypatch.chdir(tmp_path)
    given = {"--config-file": TOY, "--checkpoint": weights, "--output": "new/toy.pt2", **change}
    try:
        code = script.main([part for pair in given.items() for part in pair])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == status and message in error.splitlines()[-1] and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_of_onnx_it_says_what_to_install(script, weights, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "ccnet_d2.export.onnx_format", raising=False)
    output = tmp_path / "toy.onnx"
    assert script.main(["--config-file", TOY, "--checkpoint", weights, "--output", str(output)]) == 1
    assert "onnx is missing: pip install 'ccnet_d2[export]'" in capsys.readouterr().err
    assert not output.exists()


def test_a_torch_without_the_exporter_of_onnx_is_named(script, weights, tmp_path, monkeypatch, capsys):
    """As torch up to 2.5, whose function has other arguments."""
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, dynamo=False: None)
    output = tmp_path / "toy.onnx"
    assert script.main(["--config-file", TOY, "--checkpoint", weights, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert f"need a newer torch than {torch.__version__}: take 2.10 or later, or write a .pt2 file." in error
    assert not output.exists()
