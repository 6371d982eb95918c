"""A table of one run trained with several values of a setting and several seeds (CCNet, TPAMI, Tab. 1, 3 and 4)."""

import json
import re
import statistics
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccnet_d2.atomic_file import atomic_write_text
from ccnet_d2.errors import UserError

from .comparison import Variant, VariantRun, train_variants
from .overrides import load_run, refuse_overridden
from .settings import make_output_dir


def compare_runs(
    config_file: str,
    key: str,
    values: Sequence[str],
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a run with every value of a key and every seed, and write table.md and table.json to `output`.

    Runs that an earlier call finished there are not trained again. A run that fails, for instance because its loss is
    not finite, counts as failed; the others go on.

    Args:
        config_file: as for `train_net.py --config-file`.
        key: what differs, such as "model.sem_seg_head.context".
        values: its values.
        output: folder; each training writes to a folder of its own in it.
        seeds: of initial weights and data order.
        overrides: for all runs.

    Returns:
        What table.json holds: per value the mIoU in percent of each seed (None: failed), their mean and standard
        deviation (that of a sample, over n - 1; None of one run), and the seconds an iteration took.

    Raises:
        UserError: the key, a value or an override is unknown or would be overridden, the folder cannot be written to,
            or no run succeeded.
    """
    _refuse_what_is_overridden(key, overrides)
    values, seeds = list(dict.fromkeys(values)), list(dict.fromkeys(seeds))
    variants = {}
    names = _folder_names(values)
    for value in values:
        for seed in seeds:
            name = f"{names[value]}_seed{seed}"
            changes = (f"{key}={value}", f"train.seed={seed}")
            variants[value, seed] = Variant(name, f"{value}, seed {seed}", changes)
    # Fail on a wrong key at once, not in every process.
    for variant in variants.values():
        load_run(config_file, [*overrides, *variant.overrides])
    make_output_dir(str(output), "output")
    runs = train_variants(
        config_file,
        list(variants.values()),
        output,
        overrides=overrides,
        keep_finished=True,
        stop_at_failure=False,
    )
    by_variant = dict(zip(variants, runs, strict=True))
    if all(run.error for run in runs):
        raise UserError(f"All {len(runs)} runs failed; the first: {runs[0].error}")
    result = {
        "config": config_file,
        "key": key,
        "overrides": list(overrides),
        "seeds": list(seeds),
        "rows": [_row(value, [by_variant[value, seed] for seed in seeds]) for value in values],
    }
    atomic_write_text(output / "table.json", json.dumps(result, indent=2) + "\n")
    commands = "\n".join(run.command for run in runs)
    atomic_write_text(output / "table.md", format_table(result) + f"\n\n```\n{commands}\n```\n")
    return result


def _refuse_what_is_overridden(key: str, overrides: Sequence[str]) -> None:
    setters = {"train.seed": "--seeds", "train.output_dir": "--output"}
    if key in setters:
        raise UserError(f"{key} cannot be what differs, as {setters[key]} sets it for each run.")
    refuse_overridden(overrides, {**setters, key: "--values"})


def _folder_names(values: Sequence[str]) -> dict[str, str]:
    """A name for the folder of each value; of several that would have one name, each gets its checksum."""
    plain = {value: re.sub(r"[^A-Za-z0-9.]+", "_", value) for value in values}
    names: dict[str, str] = {}
    for value, name in plain.items():
        same = [other for other in plain if plain[other] == name]
        names[value] = name if len(same) == 1 else f"{name}_{zlib.crc32(value.encode()):08x}"
    return names


def format_table(result: dict[str, Any]) -> str:
    """What `compare_runs` returned, as a Markdown table."""
    name = result["key"].rpartition(".")[2]
    lines = [
        f"| {name} | mIoU | standard deviation | lowest | highest | succeeded | s/iteration |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        succeeded = [miou for miou in row["miou"] if miou is not None]
        figures = (
            [
                f"{row['mean']:.1f}",
                "–" if row["deviation"] is None else f"{row['deviation']:.1f}",
                f"{min(succeeded):.1f}",
                f"{max(succeeded):.1f}",
            ]
            if succeeded
            else ["–"] * 4
        )
        seconds = row["seconds_per_iteration"]
        figures += [f"{len(succeeded)}/{len(row['miou'])}", "–" if seconds is None else f"{seconds:.3f}"]
        lines.append(f"| {row['value']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _row(value: str, runs: Sequence[VariantRun]) -> dict[str, Any]:
    succeeded = [run for run in runs if run.error is None]
    mious = [run.miou for run in succeeded]
    seconds = [run.seconds_per_iteration for run in succeeded if run.seconds_per_iteration is not None]
    return {
        "value": value,
        "miou": [None if run.error else run.miou for run in runs],
        "mean": statistics.fmean(mious) if mious else None,
        "deviation": statistics.stdev(mious) if len(mious) > 1 else None,
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "errors": [run.error for run in runs if run.error],
    }
