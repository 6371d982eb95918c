"""Training one run in several variants side by side, as the papers' ablation tables do."""

import functools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ccnet_d2.errors import UserError
from ccnet_d2.parent import end_with_parent

_POLL_SECONDS = 0.5
_REPORT_SECONDS = 10.0
_STOP_SECONDS = 20.0
_EVALUATION, _FINISHED = "evaluation.json", "finished.json"
_RESULT_FILES = ("metrics.json", _EVALUATION, _FINISHED)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a name for its folder, a title, and the overrides that make the difference."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()


@dataclass
class VariantRun:
    """The training of one variant."""

    variant: Variant
    output_dir: Path
    arguments: list[str]
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def miou(self) -> float:
        """Mean intersection over union, percent."""
        return float(self.metrics["sem_seg"]["mIoU"])

    @property
    def checkpoint(self) -> Path:
        """The trained weights."""
        return self.output_dir / "model_final.pth"

    @property
    def command(self) -> str:
        """What trains it again, for a shell."""
        return f"python projects/CCNet/train_net.py {shlex.join(self.arguments)}"

    @property
    def seconds_per_iteration(self) -> float | None:
        """Median over the logged iterations, data loading included; None if none was logged."""
        times = [line["time"] for line in _metrics_lines(self.output_dir / "metrics.json") if "time" in line]
        return statistics.median(times) if times else None

    def progress(self) -> str:
        """One phrase: how far it is."""
        records = _metrics_lines(self.output_dir / "metrics.json")
        if not records:
            return f"{self.variant.name}: starting"
        last = records[-1]
        eta = f", {last['eta_seconds'] / 60:.1f} min left" if "eta_seconds" in last else ""
        return f"{self.variant.name}: iteration {last['iteration'] + 1}, loss {last.get('total_loss', 0):.3f}{eta}"


def train_variants(
    config_file: str,
    variants: Sequence[Variant],
    output_dir: Path,
    *,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    keep_finished: bool = False,
    stop_at_failure: bool = True,
) -> list[VariantRun]:
    """Train and evaluate every variant in a process of its own, as many at once as there are GPUs, or else CPU cores.

    Args:
        config_file: as for `train_net.py --config-file`.
        variants: the rows.
        output_dir: each variant writes to `output_dir`/<name>; what it prints goes to train.log there.
        overrides: for all variants.
        environment: variables for the processes, beside the current ones.
        keep_finished: do not train a variant again that an earlier call finished with the same arguments.
        stop_at_failure: raise for a variant that fails; otherwise its `error` says why, and the others go on.

    Returns:
        The finished runs, in the order of `variants`.

    Raises:
        UserError: a variant failed; the message repeats its last line and names its log.
    """
    runs = []
    for variant in variants:
        folder = output_dir / variant.name
        changes = [*overrides, *variant.overrides, f"train.output_dir={_quoted(str(folder))}"]
        runs.append(VariantRun(variant, folder, ["--config-file", config_file, *changes]))
    devices: list[str | None] = [*_gpus()]
    cores = len(os.sched_getaffinity(0))
    if not devices:
        devices = [None] * min(cores, len(runs))
    # The same for all, also for the last ones, which have fewer beside them: sums are taken in another order with other
    # numbers of threads, and which runs are last may be chance.
    threads = max(1, cores // max(1, min(len(devices), len(runs))))
    waiting = [run for run in runs if not (keep_finished and _was_finished(run))]
    running: list[_Process] = []
    reported = time.monotonic()
    try:
        while waiting or running:
            while waiting and devices:
                running.append(_Process(waiting.pop(0), devices.pop(0), threads, environment or {}))
            time.sleep(_POLL_SECONDS)
            for process in [p for p in running if p.popen.poll() is not None]:
                running.remove(process)
                devices.append(process.device)
                process.finish()
                run = process.run
                if run.error and stop_at_failure:
                    raise UserError(run.error)
                print(f"{run.variant.title}: {_outcome(run)}", flush=True)
            if running and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                print(" | ".join(process.run.progress() for process in running), flush=True)
    finally:
        for process in running:
            process.popen.terminate()
        for process in running:
            process.wait_for_end()
    return runs


class _Process:
    """A training process on one GPU, or on some of the CPU's cores."""

    def __init__(
        self, run: VariantRun, device: str | None, threads: int, environment: Mapping[str, str]
    ) -> None:
        self.run = run
        self.device = device
        self._start = time.monotonic()
        self._log = run.output_dir / "train.log"
        run.output_dir.mkdir(parents=True, exist_ok=True)
        for stale in _RESULT_FILES:  # of an earlier run, which would pass for this one's
            (run.output_dir / stale).unlink(missing_ok=True)
        variables = {**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}
        if device is not None:
            variables["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, "-m", "ccnet_d2.engine.command_line", *run.arguments]
        with self._log.open("w") as log:
            self.popen = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                # A training left behind would write into the folder in which the next call trains again.
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )

    def wait_for_end(self) -> None:
        """After it was asked to stop: it saves at the end of its step."""
        try:
            self.popen.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def finish(self) -> None:
        self.run.seconds = time.monotonic() - self._start
        if self.popen.returncode != 0:
            lines = self._log.read_text(errors="replace").strip().splitlines() or ["no output"]
            reason = lines[-1].removeprefix("error: ").rstrip(".")
            self.run.error = (
                f"Training of {self.run.variant.name} failed: {reason} (whole output in {self._log})."
            )
            return
        evaluation = self.run.output_dir / _EVALUATION
        self.run.metrics = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
        if not _has_miou(self.run.metrics):
            self.run.error = (
                f"Training of {self.run.variant.name} ended without a mIoU, which is what is compared: {evaluation} "
                f"{_contents(self.run.metrics)}."
            )
            return
        finished = {
            "arguments": self.run.arguments,
            "seconds": self.run.seconds,
            "metrics": self.run.metrics,
        }
        (self.run.output_dir / _FINISHED).write_text(json.dumps(finished))


def _has_miou(metrics: Mapping[str, Any]) -> bool:
    # null, or NaN in older files, of a test set that is void throughout
    miou = metrics.get("sem_seg", {}).get("mIoU")
    return miou is not None and math.isfinite(miou)


def _contents(metrics: Mapping[str, Any]) -> str:
    """What an evaluation without a mIoU holds."""
    if "mIoU" in metrics.get("sem_seg", {}):
        return "has none, as no pixel of the test set is labelled"
    return f"holds {', '.join(metrics)}" if metrics else "is not there"


def _gpus() -> list[str]:
    """The GPUs to use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [visible[i] if visible[0] else str(i) for i in range(torch.cuda.device_count())]


def _quoted(text: str) -> str:
    """As the value of an override, in which brackets, spaces, commas and the like have meanings of their own."""
    return text if re.fullmatch(r"[A-Za-z0-9_./-]+", text) else '"' + text.replace('"', '\\"') + '"'


def _was_finished(run: VariantRun) -> bool:
    """Whether an earlier call finished this run with the same arguments; if so, take its results."""
    try:
        finished = json.loads((run.output_dir / _FINISHED).read_text())
        # An evaluation that came later, in another test mode for instance, may have replaced evaluation.json, where
        # older versions looked.
        metrics = finished.get("metrics") or json.loads((run.output_dir / _EVALUATION).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if finished["arguments"] != run.arguments or not _has_miou(metrics):
        return False
    run.seconds, run.metrics = finished["seconds"], metrics
    return True


def _outcome(run: VariantRun) -> str:
    return run.error or f"mIoU {run.miou:.1f} in {run.seconds:.0f} s"


def _metrics_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # The last line may be half written.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
