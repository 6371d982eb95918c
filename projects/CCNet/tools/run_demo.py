#!/usr/bin/env python
"""Train one small model without attention, with one and with two loops of criss-cross attention, and compare them.

Writes report.json, report.md, pictures, and everything the trainings write, into the output folder.
"""

import argparse
from pathlib import Path

from ccnet_d2.engine.demo_report import DEMOS, run_demo
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with


def main(argv: list[str] | None = None) -> int:
    """Run run_demo.py; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=sorted(DEMOS), default="synthetic")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="default: output/demo")
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, initial weights and data order; default: 0"
    )
    parser.add_argument("opts", nargs="*", help="config overrides for all three, such as train.max_iter=100")
    args = parser.parse_args(argv)
    with one_sentence_errors() as status:
        run_demo(args.dataset, args.output, seed=args.seed, overrides=args.opts)
    return status.code


if __name__ == "__main__":
    exit_with(main)
