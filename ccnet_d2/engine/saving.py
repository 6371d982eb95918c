"""Hooks that save: every so often, and when the run is told to stop."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from ccnet_d2.atomic_file import atomic_write_text
from ccnet_d2.checkpoint import SafeCheckpointer
from ccnet_d2.errors import UserError

logger = logging.getLogger(__name__)

STOPPED_STATUS = 128 + signal.SIGTERM
"""Exit status of a run that saved and stopped on SIGTERM: not 0, or a scheduler would take it to be complete."""


class Stopped(SystemExit):
    """The run was told to stop; all is saved."""

    def __init__(self) -> None:
        super().__init__(STOPPED_STATUS)


class SaveCheckpoints(HookBase):
    """Saves every `period` iterations, after the last one as model_final, and on SIGTERM, when it ends the process.

    In every process, as the state of all of them is saved. It comes before hooks that evaluate, so that nothing is
    lost where an evaluation fails.
    """

    def __init__(self, checkpointer: SafeCheckpointer, period: int, max_to_keep: int | None = None) -> None:
        """
        Args:
            checkpointer: of the trainer that this hook is registered with.
            period: iterations.
            max_to_keep: how many of the files of this run stay, apart from model_final.pth; None for all.

        Raises:
            UserError: period or max_to_keep is not positive.
        """
        if period < 1 or (max_to_keep is not None and max_to_keep < 1):
            raise UserError(
                f"train.checkpointer.period={period} and max_to_keep={max_to_keep} have to be at least 1."
            )
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep
        self._recent: list[str] = []
        self._stop = False
        self._may_interrupt = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGTERM saves at the end of the step and raises `Stopped`."""
        try:
            previous = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError:  # not the main thread, which alone can handle signals
            logger.warning("SIGTERM will not save: training does not run in the main thread.")
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # Checkpoints are written by all processes together, so that all have to know.
        stop = self._any_process_stops()
        if done >= self.trainer.max_iter:
            # Nothing else at the last iteration: a run killed between two files would have nothing left to do when it
            # is resumed, and no final weights.
            self._save("model_final", remember=False)
        elif stop or done % self._period == 0:
            self._save(f"model_{self.trainer.iter:07d}", remember=True)
            if stop:
                self._report_and_stop()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around something long after a step, such as an evaluation: SIGTERM need not wait for its end.

        With several processes it does wait, as some may have been told and others not.
        """
        self._may_interrupt = comm.get_world_size() == 1
        try:
            if self._stop and self._may_interrupt:
                raise _Interrupted
            yield
        except _Interrupted:
            self._may_interrupt = False
            if not self._checkpointer.has_checkpoint() or not self._is_saved():
                self._save(f"model_{self.trainer.iter:07d}", remember=True)
            self._report_and_stop()
        finally:
            self._may_interrupt = False

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Names of files: a checkpoint that came from elsewhere must not get others deleted.
        self._recent = [Path(name).name for name in state["recent"]]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if self._may_interrupt:
            self._may_interrupt = False
            raise _Interrupted

    def _any_process_stops(self) -> bool:
        if comm.get_world_size() == 1:
            return self._stop
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([self._stop], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _is_saved(self) -> bool:
        return Path(self._checkpointer.get_checkpoint_file()).stem in (
            f"model_{self.trainer.iter:07d}",
            "model_final",
        )

    def _save(self, name: str, *, remember: bool) -> None:
        self.trainer.gather_process_states()
        if not comm.is_main_process():
            return
        file_name = f"{name}.pth"
        if remember and file_name not in self._recent:
            self._recent.append(file_name)
        self._checkpointer.save(name, iteration=self.trainer.iter)
        if remember and self._max_to_keep is not None:
            while len(self._recent) > self._max_to_keep:
                Path(self._checkpointer.save_dir, self._recent.pop(0)).unlink(missing_ok=True)

    def _report_and_stop(self) -> None:
        logger.warning(
            "Stopped by SIGTERM after iteration %d; everything is saved: go on with --resume.",
            self.trainer.iter,
        )
        raise Stopped


class _Interrupted(BaseException):
    """SIGTERM came during an evaluation."""


class ReportBadSamples(HookBase):
    """At the end of training, however it ends, writes which samples were skipped to bad_samples.json and the log."""

    def __init__(self, bad_samples: Any, output_dir: str) -> None:
        self._bad_samples = bad_samples
        self._path = Path(output_dir) / f"bad_samples{_rank_suffix()}.json"

    def after_train(self) -> None:
        if self._bad_samples.skip:
            logger.info("%s", self._bad_samples.summary())
            atomic_write_text(self._path, json.dumps(self._bad_samples.records(), indent=2) + "\n")


def _rank_suffix() -> str:
    return f"_rank{comm.get_rank()}" if comm.get_rank() else ""
