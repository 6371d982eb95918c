"""Tables over values and seeds: real trainings of a few iterations, one of which fails."""

import json
import math
import re
from pathlib import Path

import pytest

from ccnet_d2.data import SyntheticConfig, generate_synthetic_dataset
from ccnet_d2.engine.compare_runs import _folder_names, _row, compare_runs, format_table
from ccnet_d2.engine.comparison import Variant, VariantRun
from ccnet_d2.errors import UserError

TOY = "toy/ccnet_synthetic.py"
CONTEXT = "model.sem_seg_head.context"


@pytest.mark.slow
def test_table_of_trainings(tmp_path, monkeypatch, capsys):
    generate_synthetic_dataset(
        tmp_path / "data/ccnet_synthetic", SyntheticConfig(train_images=8, val_images=4)
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    tiny = ["train.max_iter=2", "dataloader.train.total_batch_size=2", "train.num_pictures=0"]
    output = tmp_path / "out"
    # R=0 is refused when the model is built.
    result = compare_runs(TOY, CONTEXT, ["none", "rcca_r0"], output, seeds=[0], overrides=tiny)
    good, bad = result["rows"]
    measured = json.loads((output / "none_seed0/evaluation.json").read_text())["sem_seg"]["mIoU"]
    assert good["miou"] == [measured] and good["mean"] == pytest.approx(measured)
    assert bad["miou"] == [None] and "recurrence must be at least 1" in bad["errors"][0]
    assert json.loads((output / "table.json").read_text()) == result
    written = (output / "table.md").read_text()
    assert "| none |" in written and "train_net.py --config-file toy/ccnet_synthetic.py" in written

    # What is finished is not trained again.
    capsys.readouterr()
    log = output / "none_seed0/train.log"
    log.unlink()
    again = compare_runs(TOY, CONTEXT, ["none", "rcca_r0"], output, seeds=[0], overrides=tiny)
    assert again["rows"][0]["miou"] == good["miou"] and not log.exists()


def test_wrong_values_stop_before_training(tmp_path):
    with pytest.raises(UserError, match="contxt"):
        compare_runs(TOY, "model.sem_seg_head.contxt", ["none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "override", "message"),
    [
        (
            CONTEXT,
            "train.seed=5",
            "Override 'train.seed=5' has no effect, as --seeds sets train.seed for each run",
        ),
        (CONTEXT, "+train.seed=5", r"Override '\+train.seed=5' has no effect"),
        (CONTEXT, "train.output_dir=x", "Override .* as --output sets train.output_dir for each run"),
        (CONTEXT, f"{CONTEXT}=psp", f"Override .* as --values sets {CONTEXT} for each run; leave it out"),
        (
            "train.seed",
            "train.max_iter=2",
            "train.seed cannot be what differs, as --seeds sets it for each run",
        ),
        ("train.output_dir", "train.max_iter=2", "train.output_dir cannot be .*, as --output sets it"),
    ],
)
def test_what_would_be_overridden_is_refused(tmp_path, key, override, message):
    with pytest.raises(UserError, match=f"^{message}"):
        compare_runs(TOY, key, ["1", "2"], tmp_path / "out", overrides=["train.log_period=1", override])
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to output={tmp_path}/file/runs: Not a directory"):
        compare_runs("toy/ccnet_synthetic.py", "train.max_iter", ["1"], tmp_path / "file" / "runs")


def test_values_that_look_alike_get_folders_of_their_own():
    names = _folder_names(["1e-3", "1e+3", "[64, 32]", "rcca"])
    assert len(set(names.values())) == 4 and names["rcca"] == "rcca" and names["[64, 32]"] == "_64_32_"
    assert all(re.fullmatch(r"[A-Za-z0-9._]+", name) for name in names.values())
    again = _folder_names(["1e+3", "1e-3"])  # in another order, since finished runs are found by name
    assert all(names[value] == name for value, name in again.items())


def finished(variant: Variant, folder: Path, miou: float, *seconds: float) -> VariantRun:
    """A training that logged so many iterations, the last of which is half written."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"iteration": i, "time": time}) for i, time in enumerate(seconds)]
    (folder / "metrics.json").write_text("\n".join([*lines, '{"iteration": 9, "ti']))
    return VariantRun(variant, folder, ["--config-file", TOY], metrics={"sem_seg": {"mIoU": miou}})


def test_a_row_is_of_the_runs_that_succeeded(tmp_path):
    variant = Variant("a", "a")
    row = _row(
        "a",
        [
            finished(variant, tmp_path / "0", 50.0, 0.1, 0.3, 0.2),
            VariantRun(variant, tmp_path / "1", [], error="It broke."),
            finished(variant, tmp_path / "2", 60.0, 0.4),
            finished(variant, tmp_path / "3", 70.0),
            finished(variant, tmp_path / "4", 60.0, 9.0),
        ],
    )
    assert row["miou"] == [50.0, None, 60.0, 70.0, 60.0] and row["errors"] == ["It broke."]
    # Of the four as a sample of all seeds.
    assert row["mean"] == 60.0 and row["deviation"] == pytest.approx(math.sqrt((100 + 0 + 100 + 0) / 3))
    assert row["seconds_per_iteration"] == pytest.approx(0.4)  # of the medians of three runs: 0.2, 0.4, 9
    two = [finished(variant, tmp_path / name, miou) for name, miou in (("5", 1.0), ("6", 3.0))]
    assert _row("a", two)["deviation"] == pytest.approx(math.sqrt(2))
    assert _row("b", [VariantRun(variant, tmp_path / "1", [], error="It broke.")]) == {
        **{"value": "b", "miou": [None], "mean": None, "deviation": None},
        **{"seconds_per_iteration": None, "errors": ["It broke."]},
    }


def test_a_table_of_values_and_seeds(tmp_path, monkeypatch):
    """With figures in the place of the trainings; one run fails, and then all do."""
    asked = []

    def trainings(config_file, variants, output, **options):
        asked.append(options)
        runs = [finished(variant, output / variant.name, 10.0 * i) for i, variant in enumerate(variants)]
        for run in runs if len(asked) > 1 else runs[2:3]:
            run.error = "It broke."
        return runs

    monkeypatch.setattr("ccnet_d2.engine.compare_runs.train_variants", trainings)
    values, output = ["none", "rcca", "none"], tmp_path / "new" / "out"
    result = compare_runs(TOY, CONTEXT, values, output, seeds=[0, 1, 0], overrides=["train.max_iter=2"])
    assert [(row["value"], row["miou"]) for row in result["rows"]] == [
        ("none", [0.0, 10.0]),
        ("rcca", [None, 30.0]),
    ]
    assert result["seeds"] == [0, 1]
    assert json.loads((output / "table.json").read_text()) == result
    table, commands = (output / "table.md").read_text().split("\n\n```\n")
    assert table == format_table(result) and len(commands.splitlines()) == 4 + 1
    assert asked == [{"overrides": ["train.max_iter=2"], "keep_finished": True, "stop_at_failure": False}]
    with pytest.raises(UserError, match=r"^All 1 runs failed; the first: It broke\."):
        compare_runs(TOY, CONTEXT, ["none"], tmp_path / "other")


def test_format_of_a_table():
    rows = [
        {
            "value": "a",
            "miou": [50.0, None, 60.0],
            "mean": 55.0,
            "deviation": 5.0,
            "seconds_per_iteration": 0.5,
        },
        {
            "value": "b",
            "miou": [None, None, None],
            "mean": None,
            "deviation": None,
            "seconds_per_iteration": None,
        },
    ]
    lines = format_table({"key": CONTEXT, "rows": rows}).splitlines()
    assert lines[0].startswith("| context | mIoU |") and len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| a | 55.0 | 5.0 | 50.0 | 60.0 | 2/3 | 0.500 |"
    assert lines[3] == "| b | – | – | – | – | 0/3 | – |"


def test_lowest_and_highest_of_one_training_are_its_mean(tmp_path):
    """10.5498 is 10.5, and not 10.6 by way of 10.550. One alone says nothing of the spread."""
    run = VariantRun(Variant("a", "a", ()), tmp_path, [], metrics={"sem_seg": {"mIoU": 10.549793716339142}})
    line = format_table({"key": CONTEXT, "rows": [_row("a", [run])]}).splitlines()[2]
    assert line == "| a | 10.5 | – | 10.5 | 10.5 | 1/1 | – |"
