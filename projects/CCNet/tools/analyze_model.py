#!/usr/bin/env python
"""Parameters, FLOPs, memory and time of a run's model; or the papers' cost tables, computed again."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccnet_d2.analysis.ccnet_table import ccnet_table, format_ccnet_table
from ccnet_d2.analysis.ce2p_table import ce2p_table, format_ce2p_table
from ccnet_d2.analysis.clip_table import clip_table, format_clip_table
from ccnet_d2.analysis.ranet_table import format_ranet_table, ranet_table
from ccnet_d2.analysis.run import analyze_run, format_run, image_size_of
from ccnet_d2.engine import load_run
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.errors import UserError
from ccnet_d2.script_exit import exit_with

_EPILOG = """
Examples:
  analyze_model.py --config-file cityscapes/ccnet_R_101_D8_769x769_60k.py
  analyze_model.py --config-file CONFIG --image-size 1024x2048 model.sem_seg_head.context=nl
  analyze_model.py --config-file CONFIG --training-step --batch-size 2 train.device=cuda
  analyze_model.py --table ccnet --json costs.json
"""

_TABLES = {
    "ccnet": (ccnet_table, format_ccnet_table),
    "ranet": (ranet_table, format_ranet_table),
    "ce2p": (ce2p_table, format_ce2p_table),
    "clips": (clip_table, format_clip_table),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE", help="run: a path or a model zoo name")
    what.add_argument(
        "--table",
        choices=sorted(_TABLES),
        help="CCNet, Tab. 2 and 5; RANet, Tab. 3; CE2P with PSP and with RCCA side by side; or 3D attention on "
        "clips beside full attention",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="HxW",
        help="such as 512x1024, or one side; default: the run's crop",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="images, or clips, at once; default: 1"
    )
    parser.add_argument(
        "--no-time", action="store_true", help="do not run the model to see how long it takes"
    )
    parser.add_argument(
        "--training-step", action="store_true", help="run a training step to see how much memory it takes"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="change values of the config")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if args.table and (args.image_size or args.opts or args.training_step or args.batch_size != 1):
        parser.error("--table measures what the paper measured: it takes --json only")
    return args


def run(args: argparse.Namespace) -> None:
    result: dict[str, Any]
    if args.table:
        compute, layout = _TABLES[args.table]
        # The papers' tables hold no times.
        result = compute(measure_time=not args.no_time) if args.table == "clips" else compute()
        print(layout(result))
    else:
        cfg = load_run(args.config_file, args.opts)
        result = analyze_run(
            cfg,
            args.image_size or image_size_of(cfg),
            batch_size=args.batch_size,
            time=not args.no_time,
            training_step=args.training_step,
        )
        print(format_run(args.config_file, result))
    if args.json:
        _write(args.json, json.dumps(result, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}.") from error


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH in pixels, for instance 512x1024")
    return int(sides[1]), int(sides[2] or sides[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run analyze_model.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        run(args)
    return status.code


if __name__ == "__main__":
    exit_with(main)
