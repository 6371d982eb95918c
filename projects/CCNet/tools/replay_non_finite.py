#!/usr/bin/env python
"""Run again a training step whose loss or gradient was not finite, from the file that train_net.py wrote about it.

replay_non_finite.py --config-file CONFIG output/non_finite/iteration_0000123_process_0_batch_0.pth
"""

import argparse
from collections.abc import Sequence

from ccnet_d2.engine.non_finite import load_step, replay
from ccnet_d2.engine.overrides import load_run
from ccnet_d2.engine.training import build_model
from ccnet_d2.engine.user_errors import one_sentence_errors
from ccnet_d2.script_exit import exit_with


def main(argv: Sequence[str] | None = None) -> int:
    """Run replay_non_finite.py; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="CONFIG", help="of the run")
    parser.add_argument("file", help="in the folder non_finite of the run's output directory")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY=VALUE", help="those of the run, such as train.device=cpu"
    )
    arguments = parser.parse_args(argv)
    with one_sentence_errors() as status:
        step = load_step(arguments.file)
        model = build_model(load_run(arguments.config_file, arguments.opts))
        finding = replay(model, step)
        losses = ", ".join(f"{name}={value:g}" for name, value in step.losses.items())
        print(f"iteration {step.iteration}: {losses}")
        print(f"images: {', '.join(step.images)}")
        print(f"then: {step.finding.detail}")
        print(f"now: {finding.detail}")
    return status.code


if __name__ == "__main__":
    exit_with(main)
