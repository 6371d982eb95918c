#!/usr/bin/env python
"""A local web page to click pixels and see where one model looks, or two models side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ccnet_d2.engine import load_run
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.errors import UserError
from ccnet_d2.inference import Predictor, find_images
from ccnet_d2.inference.viewer import Gallery, make_server
from ccnet_d2.script_exit import exit_with

_EPILOG = """
Examples:
  attention_viewer.py --model CONFIG model_final.pth --input photos/
  attention_viewer.py --model CONFIG r1/model_final.pth model.sem_seg_head.context=rcca_r1 \\
      --model CONFIG r2/model_final.pth --input photos/

The page is served on this machine's 127.0.0.1 alone. From another machine: ssh -L 8000:127.0.0.1:8000 MACHINE.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="append",
        required=True,
        metavar="VALUE",
        help="CONFIG CHECKPOINT [KEY=VALUE ...]: a run, its weights and overrides; repeat it to compare",
    )
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="images, folders or patterns")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="default: 8000; 0 for any free one"
    )
    parser.add_argument(
        "--longest-side",
        type=int,
        default=1024,
        metavar="N",
        help="larger images are reduced to this (default: 1024)",
    )
    args = parser.parse_args(argv)
    if any(len(values) < 2 for values in args.model):
        parser.error("--model needs a config and a checkpoint, for instance --model CONFIG model_final.pth")
    if args.longest_side < 16:
        parser.error("--longest-side must be at least 16")
    return args


def run(args: argparse.Namespace) -> None:
    images = find_images(args.input) if args.input else []
    models = []
    for config, checkpoint, *overrides in args.model:
        if "=" in checkpoint:
            raise UserError(f"--model {config} needs a checkpoint before its overrides, got '{checkpoint}'.")
        cfg = load_run(config, overrides)
        name = " ".join([Path(config).stem, *(override.rpartition(".")[2] for override in overrides)])
        models.append((name, Predictor(cfg, checkpoint, mode="whole")))
    gallery = Gallery(models, images, longest_side=args.longest_side)
    with make_server(gallery, args.port) as server:
        print(f"Open {server.url} in a browser; Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(argv: Sequence[str] | None = None) -> int:
    """Run attention_viewer.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        run(args)
    return status.code


if __name__ == "__main__":
    exit_with(main)
