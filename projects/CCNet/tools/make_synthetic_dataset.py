#!/usr/bin/env python3
"""Write the synthetic data set on which the class of an object hangs on a cue elsewhere in the image.

Example:
    python projects/CCNet/tools/make_synthetic_dataset.py --height 64 --width 64 --num-kinds 3
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields

from ccnet_d2.data import DatasetError, SyntheticConfig, dataset_root, generate_synthetic_dataset
from ccnet_d2.data.datasets.synthetic import read_synthetic_manifest
from ccnet_d2.script_exit import exit_with


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--root",
        default=os.path.join(dataset_root(), "ccnet_synthetic"),
        help="folder to write (default: $DETECTRON2_DATASETS/ccnet_synthetic)",
    )
    for field in fields(SyntheticConfig):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=float if isinstance(field.default, float) else int,
            default=field.default,
            help=f"default: {field.default}; see SyntheticConfig",
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run make_synthetic_dataset.py; returns its exit status."""
    args = vars(parse(argv))
    root = args.pop("root")
    try:
        config = SyntheticConfig(**args)
        written = generate_synthetic_dataset(root, config)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    manifest = read_synthetic_manifest(os.path.expanduser(root))
    assert manifest is not None
    share = manifest["objects_on_cross_of_cue"] / manifest["objects"]
    print(
        f"{'Wrote' if written else 'Already there:'} {config.train_images} training and {config.val_images} "
        f"validation images of {config.width}x{config.height}, {config.num_classes} classes, in {root}; "
        f"{share:.0%} of the objects share a row or a column with the cue."
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
