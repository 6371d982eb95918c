"""List the published weights, or fetch and convert some of them.

python -m ccnet_d2.model_zoo
python -m ccnet_d2.model_zoo imagenet/resnet50_v1c imagenet/resnet101_v1c
"""

import argparse
import logging
from collections.abc import Sequence

from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with

from .cache import cache_dir, weights_file
from .published import PUBLISHED, published


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m ccnet_d2.model_zoo`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ccnet_d2.model_zoo",
        description="List the weights that others have published, or fetch some of them, convert them and keep them.",
        epilog="CCNET_D2_CACHE: where to keep them. CCNET_D2_ZOO: a folder or mirror to take the files from.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="weights to fetch; default: list all")
    parser.add_argument("--addresses", action="store_true", help="list addresses and files too")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_sentence_errors() as status:
        entries = [published(name) for name in args.names]
        for entry in entries:
            print(weights_file(entry.name))
        if not entries:
            for entry in PUBLISHED.values():
                rest = f"  {entry.file}  {entry.address}" if args.addresses else ""
                print(f"{entry.name:52} {entry.source:15} sha256 {entry.sha256 or '(not public)'}{rest}")
            print(f"kept in {cache_dir()}; use one as ccnet://NAME wherever a checkpoint is named")
    return status.code


if __name__ == "__main__":
    exit_with(main)
