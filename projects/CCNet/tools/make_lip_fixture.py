#!/usr/bin/env python3
"""Draw the small data set in LIP's layout that configs/quick_schedules learns within minutes."""

from __future__ import annotations

import argparse
import sys

from ccnet_d2.data.datasets.lip_fixture import LAYOUTS, LipFixtureConfig, generate_lip_fixture
from ccnet_d2.data.errors import DatasetError
from ccnet_d2.script_exit import exit_with


def main(argv: list[str] | None = None) -> int:
    """Run make_lip_fixture.py; returns its exit status."""
    default = LipFixtureConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder to write (default: $DETECTRON2_DATASETS/ccnet_lip_fixture)")
    parser.add_argument("--train-images", type=int, default=default.train_images, help="default: %(default)s")
    parser.add_argument("--val-images", type=int, default=default.val_images, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=default.size, help="longer side; default: %(default)s")
    parser.add_argument("--layout", choices=LAYOUTS, default=default.layout, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        config = LipFixtureConfig(
            train_images=args.train_images,
            val_images=args.val_images,
            size=args.size,
            layout=args.layout,
            seed=args.seed,
        )
        written = generate_lip_fixture(args.root, config)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{'Drawn' if written else 'Already there'}: {args.train_images} training and {args.val_images} "
        "validation images."
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
