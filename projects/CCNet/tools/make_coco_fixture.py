#!/usr/bin/env python3
"""Draw the small COCO-format data set that configs/quick_schedules learns by heart."""

from __future__ import annotations

import argparse
import sys

from ccnet_d2.data.datasets.coco_fixture import CocoFixtureConfig, generate_coco_fixture
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.script_exit import exit_with


def main(argv: list[str] | None = None) -> int:
    """Run make_coco_fixture.py; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder to write (default: $DETECTRON2_DATASETS/ccnet_coco_fixture)")
    parser.add_argument("--images", type=int, default=CocoFixtureConfig.images, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=CocoFixtureConfig.size, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=CocoFixtureConfig.seed, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        config = CocoFixtureConfig(images=args.images, size=args.size, seed=args.seed)
        written = generate_coco_fixture(args.root, config)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'Drawn' if written else 'Already there'}: {args.images} images of {args.size}x{args.size}.")
    return 0


if __name__ == "__main__":
    exit_with(main)
