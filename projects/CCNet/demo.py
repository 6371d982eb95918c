#!/usr/bin/env python
"""Segment images with a trained run and write pictures of the result: see --help."""

import argparse
import functools
import sys
from collections.abc import Sequence

from ccnet_d2.devices import parse_devices
from ccnet_d2.engine import load_run
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.errors import UserError
from ccnet_d2.inference.batch import plan_pictures, write_pictures
from ccnet_d2.inference.build import MODE_NAMES, build_mode
from ccnet_d2.inference.images import find_images
from ccnet_d2.inference.mode import InferenceMode
from ccnet_d2.inference.multi_scale import DEFAULT_SCALES
from ccnet_d2.inference.parallel import write_pictures_on
from ccnet_d2.inference.predictor import Predictor
from ccnet_d2.inference.video import show_video, write_video
from ccnet_d2.inference.video_files import Camera, open_video
from ccnet_d2.inference.video_predictor import VideoPredictor
from ccnet_d2.script_exit import exit_with

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
  RANet's regions and their representative pixels:
    demo.py --config-file camvid/ranet_R_18_D8_half.py ... --input street.png --regions --output regions.png
  A folder on two GPUs (all: on every GPU there is):
    demo.py ... --input photos/ --output pictures/ --devices cuda:0,cuda:1
  A video, or a folder of frames; a model of clips (CCNet3D) takes it in overlapping clips:
    demo.py ... --video-input drive.mp4 --output segmented.mp4
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment images and videos with a trained run and write pictures of the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="run: a path or a model zoo name"
    )
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="weights (the same as train.init_checkpoint=PATH)"
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", nargs="+", metavar="PATH", help="images, folders or patterns")
    inputs.add_argument("--video-input", metavar="PATH", help="a video, or a folder of its frames")
    inputs.add_argument("--webcam", type=int, nargs="?", const=0, metavar="N", help="a camera (default: 0)")
    parser.add_argument(
        "--output", metavar="PATH", help="folder, or a file for one image (.png, .jpg) or video (.mp4)"
    )

    _add_picture_options(parser)
    _add_mode_options(parser)
    _add_video_options(parser)
    parser.add_argument(
        "--devices", metavar="LIST", help="share the images among cuda:0,cuda:1 or all GPUs, or cpu,cpu"
    )
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY=VALUE", help="change values of the config"
    )
    args = parser.parse_args(argv)
    _check_video_options(parser, args)
    _check_picture_options(parser, args)
    _check_mode_options(parser, args)
    return args


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("what to write (default: --overlay)").add_mutually_exclusive_group()
    for name, text in (
        ("overlay", "class colours over the image, with a legend"),
        ("side-by-side", "image | prediction, and with --ground-truth | ground truth | difference"),
        ("labels", "one-channel PNG of class indices"),
        ("confidence", "probability of the winning class"),
        ("regions", "RANet's regions, their representative pixels and scores"),
    ):
        pictures.add_argument(f"--{name}", dest="picture", action="store_const", const=name, help=text)
    pictures.add_argument(
        "--attention", type=_pixel, metavar="X,Y", help="where this pixel looks, for R = 1, 2, ..."
    )
    parser.add_argument("--ground-truth", metavar="DIR", help="label maps (.png) with the images' names")


def _add_mode_options(parser: argparse.ArgumentParser) -> None:
    modes = parser.add_argument_group("test mode")
    modes.add_argument("--mode", choices=MODE_NAMES, help="default: that of the run, else whole")
    modes.add_argument(
        "--tile", type=int, nargs="+", metavar="N", help="size, or height and width (default: 769)"
    )
    modes.add_argument("--stride", type=int, nargs="+", metavar="N", help="default: 2/3 of the tile")
    modes.add_argument("--tiles-per-batch", type=int, metavar="N", help="tiles in one pass (default: 1)")
    modes.add_argument("--scales", type=float, nargs="+", metavar="S", help="default: 0.5 to 1.75 by 0.25")
    modes.add_argument("--no-flip", action="store_true", help="do not average with the mirrored image")


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    videos = parser.add_argument_group("videos")
    videos.add_argument("--clip-length", type=int, metavar="T", help="frames of a clip (default: the run's)")
    videos.add_argument(
        "--clip-stride", type=int, metavar="S", help="frames between clips' starts (default: half a clip)"
    )
    videos.add_argument(
        "--clip-step", type=int, metavar="N", help="frames between those of a clip (default: 1)"
    )
    videos.add_argument("--fps", type=float, help="of the result (default: the video's; 10 for a folder)")


def _check_picture_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.output is None and args.webcam is None:
        parser.error(
            "--output is needed: name a folder, or a .png file for a single image, to write pictures to"
        )
    if args.attention is not None and args.mode not in (None, "whole"):
        parser.error("--attention looks at the image as a whole: leave --mode out")
    if args.picture == "regions" and args.mode not in (None, "whole"):
        parser.error("--regions looks at the image as a whole: leave --mode out")


def _check_mode_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for option, needed in (
        ("tile", "slide"),
        ("stride", "slide"),
        ("tiles_per_batch", "slide"),
        ("scales", "ms"),
    ):
        if getattr(args, option) is not None and needed not in (args.mode or ""):
            parser.error(f"--{option.replace('_', '-')} needs --mode {needed} or ms-slide")
    if args.no_flip and "ms" not in (args.mode or ""):
        parser.error("--no-flip needs --mode ms or ms-slide")


def _check_video_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.input is not None:
        for option in ("clip_length", "clip_stride", "clip_step", "fps"):
            if getattr(args, option) is not None:
                parser.error(f"--{option.replace('_', '-')} needs --video-input or --webcam")
    elif args.devices is not None:
        parser.error(
            "--devices shares images: a video is segmented on one device, --opts train.device=cuda:0"
        )
    elif args.attention or args.ground_truth or args.picture not in (None, "overlay"):
        parser.error("videos are written as overlays: for other pictures give their frames to --input")
    if args.fps is not None and not 0 < args.fps <= 1000:
        parser.error("--fps must be above 0 and at most 1000")


def run(args: argparse.Namespace) -> None:
    if args.input is None:
        run_video(args)
        return
    find_images(args.input)  # a wrong path should not wait for the model to load
    load = functools.partial(load_run, args.config_file, args.opts)
    cfg = load()
    wanted = {
        "picture": "attention" if args.attention else args.picture or "overlay",
        "pixel": args.attention,
        "ground_truth": args.ground_truth,
    }
    if args.devices is None:
        predictor = Predictor(cfg, args.checkpoint, mode=_mode(args))
        result = write_pictures(predictor, args.input, args.output, **wanted)
    else:
        devices = parse_devices(args.devices)
        jobs = plan_pictures(args.input, args.output, **wanted)
        result = write_pictures_on(devices, load, args.checkpoint, jobs, mode=_mode(args))
    print(f"{len(result.written)} written to {args.output}")
    _report(result.problems)


def run_video(args: argparse.Namespace) -> None:
    with Camera(args.webcam) if args.video_input is None else open_video(args.video_input) as source:
        cfg = load_run(args.config_file, args.opts)
        predictor = VideoPredictor(
            cfg,
            args.checkpoint,
            mode=_mode(args),
            clip_length=args.clip_length,
            clip_stride=args.clip_stride,
            clip_step=args.clip_step,
        )
        if args.video_input is None:
            result = show_video(predictor, source, args.output, fps=args.fps)
        else:
            result = write_video(predictor, source, args.output, fps=args.fps)
    print(f"{result.frames} frames" + (f" written to {args.output}" if args.output else ""))
    _report(result.problems)


def _mode(args: argparse.Namespace) -> InferenceMode | None:
    if args.mode is None:
        return None
    return build_mode(
        args.mode,
        tile=769 if args.tile is None else _one_or_two(args.tile),
        stride=None if args.stride is None else _one_or_two(args.stride),
        tiles_per_batch=1 if args.tiles_per_batch is None else args.tiles_per_batch,
        scales=args.scales or DEFAULT_SCALES,
        flip=not args.no_flip,
    )


def _report(problems: Sequence[str]) -> None:
    """Say what could not be read; any of it makes the exit status 1."""
    for problem in problems[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise UserError(problems[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run demo.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        run(args)
    return status.code


def _pixel(text: str) -> tuple[int, int]:
    x, comma, y = text.partition(",")
    if not (comma and x.strip().isdecimal() and y.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not X,Y, for instance 120,80 (column and row from 0)")
    return int(x), int(y)


def _one_or_two(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(sizes) == 1 else sizes


if __name__ == "__main__":
    exit_with(main)
