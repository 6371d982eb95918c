#!/usr/bin/env python
"""Make label maps of 59 and of 60 classes, and the lists of the split, from the published files of PASCAL Context."""

import argparse
import os
from collections.abc import Sequence

from ccnet_d2.data import dataset_root
from ccnet_d2.data.datasets.pascal_context import convert_pascal_context
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with
from progress_bar import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run prepare_pascal_context.py; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", help="folder of the .mat files, of trainval.tar.gz")
    parser.add_argument("--voc", metavar="DIR", help="default: $DETECTRON2_DATASETS/VOC2010")
    args = parser.parse_args(argv)
    with one_sentence_errors() as status:
        with progress_bar("label map") as progress:
            counts = convert_pascal_context(
                args.voc or os.path.join(dataset_root(), "VOC2010"), args.annotations, progress=progress
            )
        print(", ".join(f"{split}: {count} images" for split, count in counts.items()))
    return status.code


if __name__ == "__main__":
    exit_with(main)
