#!/usr/bin/env python3
"""Read a data set once and report everything that would spoil a training run.

Label histogram, values that are no class, black and white masks, missing, damaged or mismatched files, and
classes that the validation set has but the training set lacks. Exits with 1 if something is wrong.

Examples:
    python projects/CCNet/tools/check_dataset.py camvid_sem_seg_train camvid_sem_seg_val
    python projects/CCNet/tools/check_dataset.py --config-file my_run.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from ccnet_d2.data import DatasetError
from ccnet_d2.data.check import DatasetReport, check_coverage, check_dataset, format_report
from ccnet_d2.engine.user_errors import USER_ERRORS, sentence_of
from ccnet_d2.engine.yacs_config import load_config
from ccnet_d2.model_zoo import config_path
from ccnet_d2.script_exit import exit_with
from progress_bar import progress_bar


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "datasets", nargs="*", metavar="TRAIN [VAL ...]", help="registered names, training first"
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="run whose data to check: a path or a model zoo name"
    )
    parser.add_argument("--labels-only", action="store_true", help="do not decode images (faster)")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="files read at once (default: as many as there are CPU cores, %(default)s)",
    )
    parser.add_argument(
        "--max-problems",
        type=int,
        default=20,
        metavar="N",
        help="problems printed for each data set (default: 20)",
    )
    args = parser.parse_args(argv)
    if bool(args.datasets) == bool(args.config_file):
        parser.error("give the names of registered data sets, or --config-file")
    if args.max_problems < 0:
        parser.error("--max-problems must be at least 0")
    return args


def names_in_config(path: str) -> tuple[list[str], list[str]]:
    """Data sets of ``dataloader.train``, and those of ``dataloader.test`` that are no training sets too.

    Of a yacs config, those of ``DATASETS``.
    """
    if path.endswith((".yaml", ".yml")):
        key = "DATASETS.TRAIN"
        node = load_config(path).DATASETS
        train, test = _as_list(node.TRAIN), _as_list(node.TEST)
    else:
        key = "dataloader.train.dataset.names"
        cfg = LazyConfig.load(str(config_path(path)))
        train, test = (
            _as_list(OmegaConf.select(cfg, f"dataloader.{split}.dataset.names"))
            for split in ("train", "test")
        )
    if not train and not test:
        raise DatasetError(f"The config file '{path}' has no {key}.")
    return train, [name for name in test if name not in train]


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(dict.fromkeys(names or []))


def run_check(name: str, args: argparse.Namespace) -> DatasetReport:
    """Check one data set under a progress bar on standard error."""
    with progress_bar("sample", desc=name, leave=False, disable=not sys.stderr.isatty()) as progress:
        return check_dataset(
            name, with_images=not args.labels_only, threads=max(args.threads, 1), progress=progress
        )


def print_findings(problems: list[str], notes: list[str], most: int) -> None:
    for problem in problems[:most]:
        print(f"  problem: {problem}")
    if len(problems) > most:
        print(f"  problem: … and {len(problems) - most} more; see them with --max-problems.")
    for note in notes:
        print(f"  note: {note}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    wrong = 0
    reports: dict[str, DatasetReport] = {}
    try:
        if args.datasets:
            train, *test = dict.fromkeys(args.datasets)
            trained = [train]
        else:
            trained, test = names_in_config(args.config_file)
    except USER_ERRORS as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 1
    for name in [*trained, *test]:
        try:
            report = run_check(name, args)
        except DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            wrong += 1
            continue
        reports[name] = report
        print(format_report(report))
        print_findings(report.problems, report.notes, args.max_problems)
        wrong += len(report.problems)
    # If a training set could not be read there is nothing to compare with.
    if trained and all(name in reports for name in trained):
        for name in test:
            if name not in reports:
                continue
            problems, notes = check_coverage([reports[other] for other in trained], reports[name])
            if problems or notes:
                print(f"{' and '.join(trained)} against {name}")
                print_findings(problems, notes, args.max_problems)
            wrong += len(problems)
    print(f"{wrong} problem{'s' * (wrong != 1)} found." if wrong else "No problems found.")
    return 1 if wrong else 0


if __name__ == "__main__":
    exit_with(main)
