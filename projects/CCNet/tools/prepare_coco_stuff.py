#!/usr/bin/env python
"""Make label maps of 171 classes from the published files of COCO-Stuff 10k."""

import argparse
import os
from collections.abc import Sequence

from ccnet_d2.data import dataset_root
from ccnet_d2.data.datasets.coco_stuff import convert_coco_stuff
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with
from progress_bar import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run prepare_coco_stuff.py; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        nargs="?",
        help="the unpacked release (default: $DETECTRON2_DATASETS/cocostuff-10k-v1.1)",
    )
    args = parser.parse_args(argv)
    with one_sentence_errors() as status:
        with progress_bar("label map") as progress:
            counts = convert_coco_stuff(
                args.folder or os.path.join(dataset_root(), "cocostuff-10k-v1.1"), progress=progress
            )
        print(", ".join(f"{split}: {count} images" for split, count in counts.items()))
    return status.code


if __name__ == "__main__":
    exit_with(main)
