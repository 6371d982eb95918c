#!/usr/bin/env python
"""Kill a training with SIGKILL again and again, go on with --resume each time, and compare with one left alone.

    python tests/reliability/kill_and_resume.py --kills 100

A third of the kills falls at any moment of the run, a third a drawn time after a save began, and a third right at a
drawn operation of a save (a write, a sync, a rename, the removal of an old file). The number of loader workers is
drawn anew for each start. The table tells, for each kind, how many kills hit a save that was under way, how many left a
latest checkpoint that cannot be loaded, and how many runs ended with weights or optimizer state that differ in a bit.
"""

import argparse
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

SMALL_RUN = Path(__file__).with_name("small_run.py")
KINDS = ("any moment", "a time into a save", "an operation of a save")


@dataclass
class Tally:
    """What came of the kills of one kind."""

    kills: int = 0
    in_save: int = 0
    resumed: int = 0
    unloadable: int = 0


@dataclass
class Results:
    """What came of all of them."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    runs: int = 0
    differing: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """In all."""
        return sum(tally.kills for tally in self.tallies.values())

    @property
    def passed(self) -> bool:
        """Nothing lost and nothing different."""
        return not self.problems and not self.differing


class Child:
    """A training in a process of its own, forked from this one so that it starts at once."""

    def __init__(self, output: Path, workers: int, die_at: int | None = None) -> None:
        self.start = time.monotonic()
        self.saving = False
        self.saves = 0
        self._pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            status = 70
            try:
                status = _train(output, workers, writer, die_at)
            finally:
                os._exit(status)
        os.close(writer)

    def wait(self, until: float | None, save: int | None = None) -> bool:
        """Wait for a moment, for the start of the n-th save, or for the end; whether the process still runs."""
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return True
            if not self._read():
                return False
            if save is not None and self.saves >= save and self.saving:
                return True

    def kill(self) -> None:
        """SIGKILL; then what the process still told."""
        os.kill(self.pid, signal.SIGKILL)
        while self._read():
            pass

    def end(self) -> int:
        """Its wait status, negative for a signal."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        said = os.read(self._pipe, 1)
        self.saving = said == b"S" if said else self.saving
        self.saves += said == b"S"
        return bool(said)


def _train(output: Path, workers: int, tell: int, die_at: int | None) -> int:
    """In the child: train_net.py, telling when a save begins and ends, and dying at its `die_at`-th operation."""
    from ccnet_d2 import atomic_file
    from ccnet_d2.checkpoint import SafeCheckpointer
    from ccnet_d2.engine.command_line import main

    with (output.parent / f"{output.name}.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    save = SafeCheckpointer.save

    def told(self: SafeCheckpointer, name: str, **kwargs: object) -> None:
        os.write(tell, b"S")
        save(self, name, **kwargs)
        os.write(tell, b"E")

    SafeCheckpointer.save = told  # type: ignore[method-assign]
    if die_at is not None:
        _die_at(die_at, atomic_file)
    return main(
        [
            "--config-file",
            str(SMALL_RUN),
            "--resume",
            f"train.output_dir={output}",
            f"dataloader.train.num_workers={workers}",
            "train.checkpointer.max_to_keep=2",
        ]
    )


def _die_at(number: int, atomic_file: object) -> None:
    """Die before or after the `number`-th operation of saves."""
    left = [number]

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **kwargs: object) -> object:
            for before in (True, False):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if before:
                    result = operation(*arguments, **kwargs)
            return result

        return call

    torch_save = torch.save

    def save(data: object, file: object, **kwargs: object) -> None:
        torch_save(data, _CountedFile(file, counted), **kwargs)

    torch.save = save
    os.fsync = counted(os.fsync)  # type: ignore[assignment]
    os.replace = counted(os.replace)  # type: ignore[assignment]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign, assignment]


class _CountedFile:
    """A file whose writes are operations of a save."""

    def __init__(self, file: object, counted: Callable[..., object]) -> None:
        self._file = file
        self.write = counted(file.write)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two nests of dicts, lists, tensors and values are not the same bit by bit."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [where]
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [where]
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}.{i}")
        ]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    return [] if a == b else [where]


def final_state(folder: Path) -> dict:
    """What a run ended with, but for the names of its files."""
    from ccnet_d2.checkpoint import load_file

    state = load_file(folder / "model_final.pth")
    state["trainer"]["hooks"].pop("SaveCheckpoints")
    return state


def latest_is_loadable(folder: Path) -> str:
    """ "" if there is no latest checkpoint or it can be loaded, else what is wrong."""
    from torch import nn

    from ccnet_d2.checkpoint import CheckpointError, SafeCheckpointer, load_file

    try:
        path = SafeCheckpointer(nn.Module(), str(folder)).get_checkpoint_file()
        if path:
            load_file(path)
    except CheckpointError as error:
        return str(error)
    return ""


def kill_and_resume(
    kills: int, folder: Path, seed: int = 0, report: Callable[[str], None] = print
) -> Results:
    """Do it; the data set has to be registered, and this process free of threads."""
    draw = random.Random(seed)
    whole = Child(folder / "whole", workers=0)
    whole.wait(None)
    seconds = time.monotonic() - whole.start
    if whole.end() != 0:
        raise RuntimeError((folder / "whole.log").read_text()[-2000:])
    reference = final_state(folder / "whole")
    report(f"a run left alone takes {seconds:.1f} s")
    results = Results()
    while results.kills < kills:
        _one_run(results, kills, folder / f"run_{results.runs}", seconds, draw)
        output = folder / f"run_{results.runs}"
        wrong = (
            differences(final_state(output), reference)
            if (output / "model_final.pth").is_file()
            else ["no end"]
        )
        if wrong:
            results.differing += 1
            results.problems.append(f"{output.name} differs at {wrong[0]}")
        results.runs += 1
        report(f"{results.kills} kills, {results.runs} runs complete, {len(results.problems)} problems")
    return results


def _one_run(results: Results, kills: int, output: Path, seconds: float, draw: random.Random) -> None:
    """From the first start to the end, killed now and then."""
    last: Tally | None = None
    lives = draw.randint(3, 8)
    while True:
        workers = draw.choice([0, 0, 0, 2])
        kind = KINDS[results.kills % len(KINDS)]
        # Each save of the small run takes some 40 operations.
        die_at = draw.randint(1, 120) if kind == KINDS[2] and lives and results.kills < kills else None
        child = Child(output, workers, die_at)
        if last is not None:
            last.resumed += 1
        if not lives or results.kills >= kills:
            runs = child.wait(None)
        elif kind == KINDS[0]:
            runs = child.wait(child.start + draw.uniform(0, seconds))
        elif kind == KINDS[1]:
            runs = child.wait(None, save=draw.randint(1, 3))
            time.sleep(draw.uniform(0, 0.01))
        else:
            runs = child.wait(None)
        if runs:
            child.kill()
        status = child.end()
        if status == 0:
            return
        if status != -signal.SIGKILL:
            results.problems.append(f"{output.name} ended with status {status}")
            return
        lives -= 1
        last = results.tallies[kind]
        last.kills += 1
        last.in_save += child.saving
        if problem := latest_is_loadable(output):
            last.unloadable += 1
            results.problems.append(problem)


def print_table(results: Results) -> None:
    """One line for each kind of moment, and one for all."""
    row = "{:24} {:>6} {:>10} {:>8} {:>12}"
    print(row.format("killed at", "kills", "in a save", "resumed", "unloadable"))
    tallies = list(results.tallies.items())
    total = Tally(
        *(sum(getattr(t, n) for _, t in tallies) for n in ("kills", "in_save", "resumed", "unloadable"))
    )
    for kind, tally in [*tallies, ("all", total)]:
        print(row.format(kind, tally.kills, tally.in_save, tally.resumed, tally.unloadable))
    print(
        f"{results.runs} runs complete, {results.differing} of them not bit-identical to the one left alone"
    )
    for problem in results.problems:
        print(f"problem: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DETECTRON2_DATASETS"] = folder
        import ccnet_d2.engine.command_line  # noqa: F401  once, for all that are forked
        from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset, register_all

        generate_synthetic_dataset(
            Path(folder) / "ccnet_synthetic", SyntheticConfig(train_images=10, val_images=2)
        )
        register_all(folder)
        start = time.monotonic()
        results = kill_and_resume(
            arguments.kills, Path(folder), arguments.seed, lambda text: print(text, flush=True)
        )
        print_table(results)
        print(f"{time.monotonic() - start:.0f} s")
    return 0 if results.passed else 1


if __name__ == "__main__":
    sys.exit(main())
