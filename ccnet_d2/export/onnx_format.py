"""A traced program as an ONNX file, and ONNX Runtime to run it. Imported only where ONNX is asked for."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any

import onnx
import onnxruntime
import onnxscript  # noqa: F401  torch's exporter needs it
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ccnet_d2.wording import first_line

from .network import ExportError
from .program import INPUT, OUTPUT

__all__ = ["onnx_bytes", "onnx_runner"]

_KNOWN_TO_WORK = (2, 10)  # versions of torch; 2.6 makes no file of criss-cross attention
_LARGEST = 2**31 - 1  # what one protocol buffer holds
_SIZES = ("batch", None, "height", "width")


def onnx_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """The content of one self-contained .onnx file, its input `images` and its output `logits`.

    Args:
        program: of `trace`.
        metadata: entries for the file's `metadata_props`.

    Raises:
        ExportError: an operator has no ONNX form, the weights exceed the 2 GB of one file, or the file is not valid by
            the onnx package.
    """
    silence = io.StringIO()  # the exporter prints its progress
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silence):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, optimize=True, verbose=False
            )
            assert made is not None
            model = made.model_proto
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = (
            "" if torch.__version__ >= _KNOWN_TO_WORK else f"; torch is {torch.__version__}, 2.10 may make it"
        )
        raise ExportError(f"the network has no ONNX form: {first}{advice}") from error
    if model.ByteSize() > _LARGEST:
        raise ExportError(
            f"the network takes {model.ByteSize() / 1e9:.1f} GB, and one .onnx file holds 2 GB: write a .pt2 file."
        )
    _name_sizes(model.graph)
    _forget_the_tracing(model)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the file that torch made is no valid ONNX (onnx {onnx.__version__}): {first_line(error)}"
        ) from error
    return model.SerializeToString()


def onnx_runner(content: bytes) -> Any:
    """A function from images to logits that runs the file in ONNX Runtime on the CPU.

    Raises:
        ExportError: ONNX Runtime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a failure is raised; it need not be printed as well
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class but this one
        raise ExportError(f"ONNX Runtime cannot load the file: {error}") from error

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot run the file on images {tuple(images.shape)}: {error}"
            ) from error

    return run


def _name_sizes(graph: Any) -> None:
    """Give the open sizes of input and output their names, in place of the tracer's symbols."""
    named = {}
    for dim, name in zip(graph.input[0].type.tensor_type.shape.dim, _SIZES, strict=True):
        if dim.dim_param and name:
            named[dim.dim_param] = name
    if set(named.values()) != {"batch", "height", "width"}:
        raise ExportError("the traced network takes images of one batch size, height or width only.")
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in named))
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.sub(lambda match: named[match[0]], dim.dim_param)
    for dim, name in zip(graph.output[0].type.tensor_type.shape.dim, _SIZES, strict=True):
        if name:
            dim.dim_param = name


def _forget_the_tracing(model: Any) -> None:
    """Drop the exporter's notes, which name files of this machine and are of no use to a runtime."""
    del model.metadata_props[:]
    parts = [model.graph, *model.graph.input, *model.graph.output, *model.graph.value_info]
    for part in (*parts, *model.graph.node, *model.graph.initializer, *model.functions):
        del part.metadata_props[:]
        if isinstance(part, onnx.NodeProto):
            part.doc_string = ""
