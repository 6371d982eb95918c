#!/usr/bin/env python
"""Write a trained run as one ONNX or torch.export file for images of any size, checked against PyTorch."""

import argparse
import re
from collections.abc import Sequence

from ccnet_d2.engine import load_run
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.export import DEFAULT_SIZES, export_run
from ccnet_d2.script_exit import exit_with

_EPILOG = """
Examples:
  export.py --config-file CONFIG --checkpoint model_final.pth --output ccnet.onnx
  export.py --config-file CONFIG --checkpoint model_final.pth --output ccnet.pt2
  export.py ... --output ccnet.onnx --check 1x512x1024 2x769x769 1x300x400
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="run: a path or a model zoo name"
    )
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="weights (the same as train.init_checkpoint=PATH)"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="what to write: .onnx, or .pt2 for torch.export"
    )
    parser.add_argument(
        "--check",
        nargs="+",
        type=_size,
        default=DEFAULT_SIZES,
        metavar="BxHxW",
        help="batches to compare on; default: "
        + " ".join("x".join(map(str, size)) for size in DEFAULT_SIZES),
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="T",
        help="largest difference allowed, relative to the largest logit where that is above 1; default: 1e-4",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="change values of the config")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    cfg = load_run(args.config_file, args.opts)
    report = export_run(cfg, args.output, args.checkpoint, sizes=args.check, tolerance=args.tolerance)
    for difference in report.differences:
        print(difference)
    worst = max(difference.largest for difference in report.differences)
    print(f"{report.path} written, {report.size / 1e6:.1f} MB; largest difference from PyTorch {worst:.1e}")


def _size(text: str) -> tuple[int, int, int]:
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if sizes is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not BATCHxHEIGHTxWIDTH, for instance 1x512x1024")
    return int(sizes[1]), int(sizes[2]), int(sizes[3])


def main(argv: Sequence[str] | None = None) -> int:
    """Run export.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        run(args)
    return status.code


if __name__ == "__main__":
    exit_with(main)
