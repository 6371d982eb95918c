#!/usr/bin/env python
"""Make label maps of 11 classes, and the lists of the usual split, from CamVid's original 960x720 release."""

import argparse
import os
from collections.abc import Sequence

from ccnet_d2.data import dataset_root
from ccnet_d2.data.datasets.camvid_original import convert_camvid
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with
from progress_bar import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run prepare_camvid.py; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        nargs="?",
        help="holds 701_StillsRaw_full and LabeledApproved_full (default: $DETECTRON2_DATASETS/camvid_original)",
    )
    args = parser.parse_args(argv)
    folder = args.folder or os.path.join(dataset_root(), "camvid_original")
    with one_sentence_errors() as status:
        with progress_bar("label map") as progress:
            report = convert_camvid(folder, progress=progress)
        print(", ".join(f"{split}: {count} frames" for split, count in report.frames.items()))
        for note in report.notes:
            print(f"note: {note}")
    return status.code


if __name__ == "__main__":
    exit_with(main)
