"""metrics.json of a run that was interrupted."""

import json
from pathlib import Path

from ccnet_d2.atomic_file import atomic_write_text


def drop_metrics_from(path: Path, iteration: int) -> None:
    """Take out the lines from `iteration` on, which are about to be written again, and any that is half written.

    The evaluation at the end of a run, which counts as of the iteration after the last one, stays where the run goes on
    from there with more iterations.

    Args:
        path: metrics.json, one JSON object per line; need not be there.
        iteration: the first one that the run will do.
    """
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if 0 <= _iteration(line) < iteration]
    if iteration > 0 and _is_last_evaluation(lines, iteration):
        kept.append(lines[-1])
    if kept != lines:
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))


def _is_last_evaluation(lines: list[str], iteration: int) -> bool:
    return bool(lines) and _iteration(lines[-1]) == iteration and "total_loss" not in json.loads(lines[-1])


def _iteration(line: str) -> int:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return -1
