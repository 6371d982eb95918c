#!/usr/bin/env python
"""Runs with several processes and machines, through train_net.py and torchrun, and what becomes of them.

    python tests/reliability/distributed_runs.py

Prints a table: gradients of 2 and 4 processes against one; an evaluation of 101 images by 1, 2 and 4; a process killed
in the middle of training; SIGTERM; the launcher killed; torchrun starting all anew after one was killed; two machines,
each a network namespace of its own (needs root and `ip`), one of which loses a process or its network. `--only` names
parts.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset  # noqa: E402
from ccnet_d2.engine.launch import Processes, launch  # noqa: E402
from tests.engine import rank_programs as programs  # noqa: E402

TRAIN_NET = ROOT / "projects/CCNet/train_net.py"
SMALL_RUN = Path(__file__).with_name("small_run.py")
START_SECONDS = 600
END_SECONDS = 60
PORT = 29611
HOSTS = ("ccnet_host_0", "ccnet_host_1")
ADDRESSES = ("10.201.77.1", "10.201.77.2")


@dataclass
class Row:
    """One line of the table."""

    what: str
    measured: str
    good: bool


class Run:
    """A train_net.py or torchrun in a process of its own."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self.log = log
        # Killed with the script's own signals only: a session of its own keeps the terminal's away.
        with log.open("w") as output:
            self.popen = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        """Process ids that train: those in which Detectron2 runs, at the leaves of the tree."""
        found = []
        waiting = [self.popen.pid]
        while waiting:
            pid = waiting.pop()
            for child in children(pid):
                arguments = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
                if "spawn_main" in " ".join(arguments) or (
                    str(TRAIN_NET) in arguments and "torchrun" not in arguments
                ):
                    found.append(child)
                waiting.append(child)
        return sorted(found)

    def wait(self, seconds: float) -> int | None:
        """Exit status; None if it runs on."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def error(self) -> str:
        """Its last `error:` line."""
        lines = [
            line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("error: ")
        ]
        return lines[-1] if lines else "no error"

    def end(self) -> None:
        """Make sure that it is over."""
        for pid in [*self.ranks(), self.popen.pid] if self.popen.poll() is None else []:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.popen.wait()


def children(pid: int) -> list[int]:
    """Process ids."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def train_net(output: Path, *arguments: str | Path) -> list[str | Path]:
    """A command that trains the small run."""
    return [TRAIN_NET, "--config-file", SMALL_RUN, *arguments, f"train.output_dir={output}"]


def wait_for(condition: Callable[[], object], run: Run, what: str) -> None:
    """Until the condition holds."""
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end or run.popen.poll() is not None:
            raise RuntimeError(f"{what} did not come about; see {run.log}:\n{run.log.read_text()[-2000:]}")
        time.sleep(0.2)


def gradients(folder: Path) -> Iterator[Row]:
    """Relative difference to one process with the whole batch in fp64, for labels of every awkward kind.

    To that of one process in fp32, it would be the rounding of both.
    """
    for processes in (2, 4):
        for name in ("float64", "float32"):
            here = folder / f"{name}_{processes}"
            here.mkdir()
            launch(programs.gradients, Processes(processes), (str(here), name))
            for case in programs.CASES:
                ours = torch.load(here / f"{case}.pt", weights_only=True)
                batch = programs.make_batch(case)
                single = in_float64(
                    programs.losses_and_gradients(programs.make_model(torch.float64, case), batch)
                )
                rounded = in_float64(
                    programs.losses_and_gradients(programs.make_model(getattr(torch, name), case), batch)
                )
                error, _ = programs.relative_errors(in_float64(ours), single)
                rounding, _ = programs.relative_errors(rounded, single)
                finite = all(gradient.isfinite().all() for gradient in ours["gradients"].values())
                yield Row(
                    f"{processes} processes, {name}, {case}",
                    f"gradients differ by {error:.1e} (one process in {name}: {rounding:.1e}), "
                    f"{'finite' if finite else 'NOT finite'}",
                    error <= 1e-6 and finite,
                )


def in_float64(result: dict) -> dict:
    """Gradients in fp64, to be compared."""
    return {**result, "gradients": {name: value.double() for name, value in result["gradients"].items()}}


def evaluation(folder: Path) -> Iterator[Row]:
    """The same numbers to the last digit, however the 101 images are split."""
    finish(Run([sys.executable, *train_net(folder / "trained", "train.max_iter=8")], folder / "train.log"))
    results = {}
    for processes in (1, 2, 4):
        output = folder / f"evaluated_{processes}"
        command = train_net(output, "--eval-only", "--num-processes", str(processes))
        finish(
            Run(
                [sys.executable, *command, f"train.init_checkpoint={folder / 'trained/model_final.pth'}"],
                folder / f"evaluated_{processes}.log",
            )
        )
        results[processes] = (output / "evaluation.json").read_text()
        miou = json.loads(results[processes])["sem_seg"]["mIoU"]
        same = results[processes] == results[1]
        yield Row(
            f"101 images, {processes} processes",
            f"mIoU {miou!r}, file {'the same' if same else 'DIFFERENT'}",
            same,
        )


def finish(run: Run) -> None:
    """Wait for a run that must succeed."""
    status = run.wait(START_SECONDS)
    run.end()
    if status != 0:
        raise RuntimeError(f"status {status}; see {run.log}:\n{run.log.read_text()[-2000:]}")


def killed(folder: Path) -> Iterator[Row]:
    """A process killed while it trains ends the run; --resume goes on."""
    output = folder / "output"
    command = [sys.executable, *train_net(output, "--num-processes", "2", "train.max_iter=1000000")]
    run = Run(command, folder / "killed.log")
    try:
        wait_for((output / "last_checkpoint").exists, run, "the first checkpoint")
        os.kill(run.ranks()[-1], signal.SIGKILL)
        start = time.monotonic()
        status = run.wait(END_SECONDS)
        seconds = time.monotonic() - start
        left = [pid for pid in run.ranks() if Path(f"/proc/{pid}").exists()]
        message = run.error()
    finally:
        run.end()
    yield Row(
        "process killed in training",
        f"status {status} after {seconds:.1f} s, {len(left)} processes left: {message}",
        status == 1 and "was killed by SIGKILL" in message and not left,
    )
    last = torch.load(output / (output / "last_checkpoint").read_text(), weights_only=True)["iteration"]
    more = train_net(output, "--num-processes", "2", "--resume", f"train.max_iter={last + 3}")
    finish(Run([sys.executable, *more], folder / "resumed.log"))
    final = torch.load(output / "model_final.pth", weights_only=True)["iteration"]
    yield Row("goes on with --resume", f"from iteration {last + 1} to {final + 1}", final == last + 2)


def stopped(folder: Path) -> Iterator[Row]:
    """SIGTERM to the launcher: all processes save, and --resume ends with the weights of a run left alone."""

    def command(output: Path, *arguments: str) -> list[str | Path]:
        few = ("train.max_iter=400", "train.eval_period=0")
        return [sys.executable, *train_net(output, "--num-processes", "2", *arguments, *few)]

    finish(Run(command(folder / "left_alone"), folder / "left_alone.log"))
    output = folder / "output"
    run = Run(command(output), folder / "stopped.log")
    try:
        wait_for((output / "last_checkpoint").exists, run, "the first checkpoint")
        run.popen.send_signal(signal.SIGTERM)
        start = time.monotonic()
        status = run.wait(END_SECONDS)
        seconds = time.monotonic() - start
    finally:
        run.end()
    last = torch.load(output / (output / "last_checkpoint").read_text(), weights_only=True)["iteration"]
    yield Row(
        "SIGTERM", f"status {status} after {seconds:.1f} s, saved at iteration {last + 1}", status == 143
    )
    finish(Run(command(output, "--resume"), folder / "resumed.log"))
    ours, alone = (
        torch.load(path / "model_final.pth", weights_only=True)["model"]
        for path in (output, folder / "left_alone")
    )
    same = all(torch.equal(ours[key], value) for key, value in alone.items())
    yield Row("SIGTERM, then --resume: final weights", "bit-identical" if same else "DIFFERENT", same)

    output = folder / "launcher_killed"
    run = Run(command(output), folder / "launcher_killed.log")
    try:
        wait_for((output / "last_checkpoint").exists, run, "the first checkpoint")
        ranks = run.ranks()
        run.popen.kill()
        start = time.monotonic()
        while any(is_running(pid) for pid in ranks) and time.monotonic() - start < END_SECONDS:
            time.sleep(0.1)
        seconds = time.monotonic() - start
        left = [pid for pid in ranks if is_running(pid)]
    finally:
        run.end()
    yield Row(
        "launcher killed",
        f"{len(left)} of {len(ranks)} processes left after {seconds:.1f} s",
        not left and len(ranks) == 2,
    )


def is_running(pid: int) -> bool:
    """Whether there is such a process that is not waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def elastic(folder: Path) -> Iterator[Row]:
    """torchrun starts all processes anew after one was killed; the weights are those of a run left alone."""
    weights = {}
    for name in ("left alone", "killed"):
        output = folder / name.replace(" ", "_")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        # Enough iterations that the kill comes in time.
        command = [
            *torchrun,
            "--max-restarts",
            "2",
            *train_net(output, "train.max_iter=400", "train.eval_period=0"),
        ]
        run = Run(command, folder / f"{output.name}.log")
        try:
            if name == "killed":
                wait_for((output / "last_checkpoint").exists, run, "the first checkpoint")
                os.kill(run.ranks()[-1], signal.SIGKILL)
            status = run.wait(START_SECONDS)
        finally:
            run.end()
        if status != 0:
            yield Row(f"torchrun, {name}", f"status {status}; see {run.log}", False)
            return
        weights[name] = torch.load(output / "model_final.pth", weights_only=True)["model"]
        starts = [
            line for line in (output / "log.txt").read_text().splitlines() if "Starting training from" in line
        ]
        yield Row(
            f"torchrun, {name}",
            "; ".join(line.split("Starting ")[-1] for line in starts),
            len(starts) == len(weights),
        )
    same = all(torch.equal(weights["killed"][key], value) for key, value in weights["left alone"].items())
    yield Row("torchrun: final weights", "bit-identical" if same else "DIFFERENT", same)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces joined by a cable; nothing else leads out of them."""
    ip("netns", "add", HOSTS[0])
    ip("netns", "add", HOSTS[1])
    try:
        ip(
            "link",
            "add",
            "ccnet_v0",
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            "ccnet_v1",
            "netns",
            HOSTS[1],
        )
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            ip("-n", host, "address", "add", f"{address}/24", "dev", f"ccnet_v{number}")
            ip("-n", host, "link", "set", f"ccnet_v{number}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def machines(folder: Path) -> Iterator[Row]:
    """One process on each of two hosts: train, lose a process, lose the network."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield Row("two machines", "not run: network namespaces need root and ip", False)
        return

    def start(output: Path, name: str, *arguments: str) -> list[Run]:
        where = ["--num-processes", "1", "--num-machines", "2", "--dist-url", f"tcp://{ADDRESSES[0]}:{PORT}"]
        return [
            Run(
                [
                    *("ip", "netns", "exec", host, sys.executable),
                    *train_net(output, *where, "--machine-rank", str(rank), *arguments),
                ],
                folder / f"{name}_host_{rank}.log",
            )
            for rank, host in enumerate(HOSTS)
        ]

    with two_hosts():
        runs = start(folder / "complete", "complete", "train.max_iter=8")
        statuses = [run.wait(START_SECONDS) for run in runs]
        yield Row("two hosts train and evaluate", f"statuses {statuses}", statuses == [0, 0])

        def lose(name: str, what: Callable[[list[Run]], None], wanted: int = 1) -> Row:
            output = folder / name
            runs = start(output, name, "train.max_iter=1000000")
            try:
                wait_for((output / "last_checkpoint").exists, runs[0], "the first checkpoint")
                what(runs)
                begin = time.monotonic()
                ends = []
                for run in runs:
                    status = run.wait(max(0.0, begin + END_SECONDS - time.monotonic()))
                    ends.append((status, time.monotonic() - begin, run.error()))
            finally:
                for run in runs:
                    run.end()
            told = "; ".join(
                f"host {i}: status {s} after {seconds:.1f} s, {message}"
                for i, (s, seconds, message) in enumerate(ends)
            )
            return Row(name.replace("_", " "), told, all(status == wanted for status, _, _ in ends))

        yield lose("process_on_host_1_killed", lambda runs: os.kill(runs[1].ranks()[-1], signal.SIGKILL))
        yield lose("process_on_host_0_killed", lambda runs: os.kill(runs[0].ranks()[-1], signal.SIGKILL))
        yield lose("SIGTERM_on_host_0", lambda runs: runs[0].popen.send_signal(signal.SIGTERM), 143)
        yield lose("cable_cut", lambda runs: ip("-n", HOSTS[1], "link", "set", "ccnet_v1", "down"))


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "gradients": gradients,
    "evaluation": evaluation,
    "killed": killed,
    "stopped": stopped,
    "elastic": elastic,
    "machines": machines,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; default: all"
    )
    parser.add_argument(
        "--output", type=Path, help="keep logs and checkpoints here; default: a temporary folder"
    )
    args = parser.parse_args()
    if args.output and args.output.exists() and any(args.output.iterdir()):
        parser.error(f"--output {args.output} is not empty: files of another time would pass for this one's")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.output or Path(temporary)).resolve()
        os.environ["DETECTRON2_DATASETS"] = str(folder / "datasets")
        generate_synthetic_dataset(
            folder / "datasets/ccnet_synthetic", SyntheticConfig(train_images=10, val_images=101)
        )
        print("| what | measured | as it should be |\n| --- | --- | --- |", flush=True)
        for part in args.only:
            (folder / part).mkdir(parents=True, exist_ok=True)
            for row in PARTS[part](folder / part):
                good = good and row.good
                print(f"| {row.what} | {row.measured} | {'yes' if row.good else 'NO'} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
