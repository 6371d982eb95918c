#!/usr/bin/env python
"""Segment images with a trained run and write pictures of the result: see --help."""

import argparse
import sys
from collections.abc import Sequence

from ccnet_d2.engine import apply_overrides
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.errors import UserError
from ccnet_d2.inference.batch import write_pictures
from ccnet_d2.inference.build import MODE_NAMES, build_mode
from ccnet_d2.inference.images import find_images
from ccnet_d2.inference.multi_scale import DEFAULT_SCALES
from ccnet_d2.inference.predictor import Predictor
from ccnet_d2.model_zoo import get_config

_EPILOG = """
Examples:
  Overlays of a folder:
    demo.py --config-file CONFIG --checkpoint model_final.pth --input photos/ --output pictures/
  Prediction, ground truth and difference:
    demo.py ... --input 'val/*.png' --side-by-side --ground-truth valannot/ --output pictures/
  Label maps of large images, in tiles, on the CPU:
    demo.py ... --input large.png --mode slide --tile 769 --labels --output labels/ --opts train.device=cpu
  Where the pixel in column 120, row 80 looks:
    demo.py ... --input street.png --attention 120,80 --output attention.png
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment images with a trained run and write pictures of the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="run: a path or a model zoo name"
    )
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="weights (the same as train.init_checkpoint=PATH)"
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="images, folders or patterns"
    )
    parser.add_argument("--output", metavar="PATH", help="folder, or a file for one image")

    pictures = parser.add_argument_group("what to write (default: --overlay)").add_mutually_exclusive_group()
    for name, text in (
        ("overlay", "class colours over the image, with a legend"),
        ("side-by-side", "image | prediction, and with --ground-truth | ground truth | difference"),
        ("labels", "one-channel PNG of class indices"),
        ("confidence", "probability of the winning class"),
    ):
        pictures.add_argument(f"--{name}", dest="picture", action="store_const", const=name, help=text)
    pictures.add_argument(
        "--attention", type=_pixel, metavar="X,Y", help="where this pixel looks, for R = 1, 2, ..."
    )
    parser.add_argument("--ground-truth", metavar="DIR", help="label maps (.png) with the images' names")

    modes = parser.add_argument_group("test mode")
    modes.add_argument("--mode", choices=MODE_NAMES, help="default: that of the run, else whole")
    modes.add_argument(
        "--tile", type=int, nargs="+", metavar="N", help="size, or height and width (default: 769)"
    )
    modes.add_argument("--stride", type=int, nargs="+", metavar="N", help="default: 2/3 of the tile")
    modes.add_argument("--tiles-per-batch", type=int, metavar="N", help="tiles in one pass (default: 1)")
    modes.add_argument("--scales", type=float, nargs="+", metavar="S", help="default: 0.5 to 1.75 by 0.25")
    modes.add_argument("--no-flip", action="store_true", help="do not average with the mirrored image")

    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY=VALUE", help="change values of the config"
    )
    args = parser.parse_args(argv)
    if args.output is None:
        parser.error(
            "--output is needed: name a folder, or a .png file for a single image, to write pictures to"
        )
    if args.attention is not None and args.mode not in (None, "whole"):
        parser.error("--attention looks at the image as a whole: leave --mode out")
    for option, needed in (
        ("tile", "slide"),
        ("stride", "slide"),
        ("tiles_per_batch", "slide"),
        ("scales", "ms"),
    ):
        if getattr(args, option) is not None and needed not in (args.mode or ""):
            parser.error(f"--{option.replace('_', '-')} needs --mode {needed} or ms-slide")
    return args


def run(args: argparse.Namespace) -> None:
    find_images(args.input)  # a wrong path should not wait for the model to load
    cfg = apply_overrides(get_config(args.config_file), args.opts)
    mode = None
    if args.mode is not None:
        mode = build_mode(
            args.mode,
            tile=769 if args.tile is None else _one_or_two(args.tile),
            stride=None if args.stride is None else _one_or_two(args.stride),
            tiles_per_batch=1 if args.tiles_per_batch is None else args.tiles_per_batch,
            scales=args.scales or DEFAULT_SCALES,
            flip=not args.no_flip,
        )
    predictor = Predictor(cfg, args.checkpoint, mode=mode)
    result = write_pictures(
        predictor,
        args.input,
        args.output,
        picture="attention" if args.attention else args.picture or "overlay",
        pixel=args.attention,
        ground_truth=args.ground_truth,
    )
    print(f"{len(result.written)} written to {args.output}")
    for problem in result.problems[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if result.problems:
        raise UserError(result.problems[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run demo.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        run(args)
    return status.code


def _pixel(text: str) -> tuple[int, int]:
    x, comma, y = text.partition(",")
    if not (comma and x.strip().isdigit() and y.strip().isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not X,Y, for instance 120,80 (column and row from 0)")
    return int(x), int(y)


def _one_or_two(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(sizes) == 1 else sizes


if __name__ == "__main__":
    sys.exit(main())
