"""What ONNX cannot hold, and what ONNX Runtime does not run, is an error that says so."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from ccnet_d2.export import ExportError

pytest.importorskip("onnxscript")
onnx_format = pytest.importorskip("ccnet_d2.export.onnx_format")

SIZES = {0: Dim("batch", min=1), 2: Dim("height", min=2), 3: Dim("width", min=2)}


class Network(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 4, 1), then

    def forward(self, images):
        return self.then(self.conv(images))


def program_of(then=torch.relu, sizes=SIZES):
    torch.manual_seed(0)
    network = Network(then).eval().requires_grad_(False)
    return torch.export.export(network, (torch.zeros(2, 3, 6, 10),), dynamic_shapes=(sizes,))


def test_a_program_runs_on_images_it_takes():
    program = program_of()
    content = onnx_format.onnx_bytes(program, {"classes": "two"})
    run = onnx_format.onnx_runner(content)
    for size in ((1, 3, 4, 5), (3, 3, 2, 7)):
        images = torch.rand(size)
        torch.testing.assert_close(run(images), program.module()(images))
    message = r"(?s)^ONNX Runtime cannot run the file on images \(1, 5, 4, 4\): .*Got: 5 Expected: 3"
    with pytest.raises(ExportError, match=message):
        run(torch.rand(1, 5, 4, 4))


def test_more_than_one_file_holds(monkeypatch):
    assert onnx_format._LARGEST == 2**31 - 1  # of a protocol buffer, by its specification
    monkeypatch.setattr(onnx_format, "_LARGEST", 100)
    with pytest.raises(
        ExportError, match=r"^the network takes .* GB, and one \.onnx file holds 2 GB: write a \.pt2"
    ):
        onnx_format.onnx_bytes(program_of(), {})


def test_an_operator_without_an_onnx_form(monkeypatch):
    with pytest.raises(ExportError, match=r"^the network has no ONNX form: .+") as error:
        onnx_format.onnx_bytes(program_of(torch.special.i0), {})
    assert "may make it" not in str(error.value)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(
        ExportError, match=r"^the network has no ONNX form: .+; torch is 2\.9\.1, 2\.10 may make it$"
    ):
        onnx_format.onnx_bytes(program_of(torch.special.i0), {})


def test_a_program_of_one_size():
    message = "the traced network takes images of one batch size, height or width only"
    with pytest.raises(ExportError, match=message):
        onnx_format.onnx_bytes(program_of(sizes={0: SIZES[0], 2: SIZES[2]}), {})


def of_a_later_onnx(graph):
    """As torch's exporter makes where it is newer than the package that checks."""
    graph.node[0].op_type = "ConvOfTheFuture"


def of_another_shape(graph):
    """Known once the shapes of all operators are worked out."""
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (of_a_later_onnx, "No Op registered for ConvOfTheFuture"),
        (of_another_shape, r"differ in .*\(4\) vs \(5\)"),
    ],
)
def test_a_file_against_the_rules_of_onnx_is_not_written(monkeypatch, fault, message):
    """It was a traceback."""
    name_sizes = onnx_format._name_sizes
    monkeypatch.setattr(onnx_format, "_name_sizes", lambda graph: (name_sizes(graph), fault(graph)))
    with pytest.raises(
        ExportError, match=rf"^the file that torch made is no valid ONNX \(onnx \S+\): .*{message}"
    ) as error:
        onnx_format.onnx_bytes(program_of(), {})
    assert "\n" not in str(error.value)


def test_what_onnx_runtime_does_not_load():
    with pytest.raises(ExportError, match=r"^ONNX Runtime cannot load the file: .+"):
        onnx_format.onnx_runner(b"no ONNX file")
