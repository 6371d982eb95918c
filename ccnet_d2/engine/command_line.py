"""The command line of train_net.py."""

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ccnet_d2.devices import available_device
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import config_path
from ccnet_d2.script_exit import exit_with

from . import yacs
from .launch import Processes, launch
from .overrides import load_run
from .settings import check_seed, make_output_dir
from .torchrun import ElasticRun, TorchrunProcess, joined_torchrun
from .training import evaluate_only, train
from .user_errors import one_sentence_errors
from .yacs_config import load_config

logger = logging.getLogger(__name__)

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
  Two processes on CPUs:
    train_net.py --config-file CONFIG --num-processes 2
  Two machines:
    train_net.py --config-file CONFIG --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
    train_net.py --config-file CONFIG --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT
  With torchrun, which starts all processes anew when one fails:
    torchrun --nproc-per-node 8 --max-restarts 3 train_net.py --config-file CONFIG
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run train_net.py; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is needed")
    late = next((option for option in args.opts if option.startswith("--")), None)
    if late is not None:
        parser.error(f"{late} stands behind {args.opts[0]}: options come before the config's values")
    with one_sentence_errors() as status:
        torchrun = TorchrunProcess.from_environment()
        if torchrun is None:
            launch(_run, _processes(args), (args,))
        else:
            if args.num_gpus != 1 or args.num_processes is not None or args.num_machines != 1:
                raise UserError(
                    "torchrun says how many processes there are: leave out --num-gpus, --num-processes and "
                    "--num-machines."
                )
            _run(args, torchrun)
    return status.code


def _parser() -> argparse.ArgumentParser:
    """Detectron2's options, by its names, and one more."""
    parser = argparse.ArgumentParser(
        description="Train a run, or evaluate it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="run: a path or a model zoo name (LazyConfig, .py), or a yacs config (.yaml)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in the output folder, from the start where there is none",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate train.init_checkpoint")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs of each machine (default: 1)"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="N", help="of this machine, counted from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://HOST:PORT of machine 0, for several machines",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY=VALUE",
        help="change values of the config, such as train.max_iter=1000; for yacs configs KEY VALUE; after all options",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="train on CPUs, with N processes on each machine (gloo), instead of --num-gpus",
    )
    return parser


def _processes(args: argparse.Namespace) -> Processes:
    if args.num_processes is not None and args.num_gpus != 1:
        raise UserError("--num-gpus and --num-processes (on CPUs) cannot be used together.")
    device = "cpu" if args.num_processes is not None else "cuda"
    per_machine = args.num_gpus if args.num_processes is None else args.num_processes
    if device == "cuda" and per_machine * args.num_machines == 1:
        device = "cpu"  # one process takes the device of the config
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--num-gpus {args.num_gpus}, but torch sees no GPU: --num-processes N trains on CPUs with N processes."
        )
    return Processes(per_machine, device, args.num_machines, args.machine_rank, args.dist_url)


def _run(args: argparse.Namespace, torchrun: TorchrunProcess | None = None) -> None:
    """What each process does."""
    program, device, output_dir = _program(args)
    if torchrun is None:
        program(args.resume)
        return
    with joined_torchrun(torchrun, torch.device(device).type):
        if args.eval_only:
            program(args.resume)
            return
        run = ElasticRun(torchrun, output_dir)
        restart = run.is_restart()
        run.begin()
        program(args.resume or restart)
        run.end()


def _program(args: argparse.Namespace) -> tuple[Callable[[bool], Any], str, str]:
    """The run as a function of `resume`, its device and its output directory."""
    on_cpu = args.num_processes is not None
    if args.config_file.endswith((".yaml", ".yml")):
        options = [*args.opts, *(["MODEL.DEVICE", "cpu"] if on_cpu else [])]
        cfg = load_config(args.config_file, options)
        available_device(cfg.MODEL.DEVICE, "MODEL.DEVICE is {}")
        make_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        return lambda resume: yacs.run(cfg, args, resume=resume), cfg.MODEL.DEVICE, cfg.OUTPUT_DIR
    options = [*args.opts, *(["train.device=cpu"] if on_cpu else [])]
    cfg = load_run(args.config_file, options)
    args.config_file = str(config_path(args.config_file))
    check_seed(cfg)
    make_output_dir(cfg.train.output_dir, "train.output_dir")

    def program(resume: bool) -> None:
        default_setup(cfg, args)
        setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="ccnet_d2")
        if args.eval_only:
            evaluate_only(cfg, resume=resume)
        else:
            train(cfg, resume=resume)

    return program, cfg.train.device, cfg.train.output_dir


if __name__ == "__main__":
    exit_with(main)
