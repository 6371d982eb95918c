"""The command line of train_net.py."""

import argparse
import sys
from collections.abc import Sequence

import torch
from detectron2.engine import default_argument_parser, default_setup, launch

from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import config_path, get_config

from . import yacs
from .overrides import apply_overrides
from .training import evaluate_only, train
from .user_errors import one_sentence_errors

_EPILOG = """
Examples:
  Train on one machine with 8 GPUs:
    train_net.py --config-file configs/camvid/ccnet_R_101_D8_504x504.py --num-gpus 8
  Change config values:
    train_net.py --config-file CONFIG train.max_iter=1000 train.device=cpu
  Go on after an interruption:
    train_net.py --config-file CONFIG --resume train.output_dir=DIR
  Evaluate a checkpoint:
    train_net.py --config-file CONFIG --eval-only train.init_checkpoint=PATH
  Two machines:
    train_net.py --config-file CONFIG --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
    train_net.py --config-file CONFIG --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run train_net.py; returns its exit status."""
    parser = default_argument_parser(epilog=_EPILOG)
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is needed")
    with one_sentence_errors() as status:
        if args.num_gpus > 1 and torch.cuda.device_count() < args.num_gpus:
            raise UserError(f"--num-gpus {args.num_gpus}, but torch sees {torch.cuda.device_count()} GPUs.")
        launch(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    return status.code


def _run(args: argparse.Namespace) -> None:
    if args.config_file.endswith((".yaml", ".yml")):
        yacs.run(args)
        return
    cfg = apply_overrides(get_config(args.config_file), args.opts)
    args.config_file = str(config_path(args.config_file))
    default_setup(cfg, args)
    if args.eval_only:
        evaluate_only(cfg, resume=args.resume)
    else:
        train(cfg, resume=args.resume)


if __name__ == "__main__":
    sys.exit(main())
