#!/usr/bin/env python
"""Convert published weights to a checkpoint for the models here.

Reads CCNets of the official code and of mmsegmentation, and ImageNet ResNets of torchvision, timm, mmsegmentation
(ResNetV1c) and MIT. Every name on both sides is accounted for; a weight of the wrong shape, or one that means nothing
here, is an error.
"""

import argparse
from collections.abc import Sequence

import torch

from ccnet_d2.checkpoint import CheckpointError
from ccnet_d2.checkpoint.convert import LAYOUTS, convert_file
from ccnet_d2.engine import load_run
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.instantiation import build_object
from ccnet_d2.script_exit import exit_with

_EPILOG = """examples:
  convert_checkpoint.py ccnet_r50-d8_512x1024_40k_cityscapes_20200616_142517-4123f401.pth ccnet.pth
  convert_checkpoint.py CS_scenes_60000.pth ccnet.pth --from official
  convert_checkpoint.py resnet50_v1c-2cccc1ad.pth pretrained/resnet50_v1c.pth
  convert_checkpoint.py SRC DST --config-file cityscapes/ccnet_R_50_D8_512x1024_40k.py
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="the published file")
    parser.add_argument("target", metavar="DST", help="the .pth or .pkl file to write")
    parser.add_argument(
        "--from",
        dest="layout",
        choices=["auto", *LAYOUTS],
        default="auto",
        help="whose names the weights have; default: auto, which goes by the names",
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="run that the weights have to fit: a path or a model zoo name; default: their own measures",
    )
    parser.add_argument(
        "--without-classifier",
        action="store_true",
        help="leave out the last layer of each head, to train on other classes",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code in SRC if it cannot be read without; only for files of somebody you trust",
    )
    parser.add_argument("--verbose", action="store_true", help="print every name")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY=VALUE", help="change values of the config"
    )
    args = parser.parse_args(argv)
    if args.opts and not args.config_file:
        parser.error(f"{args.opts[0]} changes a config, and there is no --config-file")
    return args


def run(args: argparse.Namespace) -> None:
    model = None
    if args.config_file:
        with torch.device("meta"):
            model = build_object(load_run(args.config_file, args.opts), "model")
    try:
        conversion = convert_file(
            args.source,
            args.target,
            args.layout,
            model=model,
            classifier=not args.without_classifier,
            allow_pickle=args.allow_pickle,
        )
    except CheckpointError as error:
        # The advice for training, in this script's words.
        sentence = str(error).replace("train.allow_pickle=True loads it", "--allow-pickle converts it")
        raise CheckpointError(sentence) from error
    print(f"{args.source}: {conversion.text(every_name=args.verbose)}")
    print(f"written to {args.target}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run convert_checkpoint.py; returns its exit status."""
    args = parse(argv)
    with one_sentence_errors() as status:
        run(args)
    return status.code


if __name__ == "__main__":
    exit_with(main)
