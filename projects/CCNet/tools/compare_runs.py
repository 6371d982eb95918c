#!/usr/bin/env python
"""Train one run with several values of a setting, and several seeds, and print a table of their mIoU."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ccnet_d2.engine.compare_runs import compare_runs, format_table
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with

_EPILOG = """
As many run at once as there are GPUs, or else CPU cores. Called again, it goes on with what is missing.

Example:
  compare_runs.py --config-file camvid/ccnet_R_18_D8_half.py --key model.sem_seg_head.context \\
      --values none rcca_r1 rcca --seeds 0 1 2 --output output/contexts train.max_iter=1000
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="run: a path or a model zoo name"
    )
    parser.add_argument("--key", default="model.sem_seg_head.context", help="default: %(default)s")
    parser.add_argument("--values", nargs="+", required=True, metavar="VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="changes for all runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run compare_runs.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        result = compare_runs(
            args.config_file, args.key, args.values, args.output, seeds=args.seeds, overrides=args.opts
        )
        print(f"\n{format_table(result)}\nTable and commands: {args.output}/table.md")
    return status.code


if __name__ == "__main__":
    exit_with(main)
