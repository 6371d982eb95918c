"""Tables over values and seeds: real trainings of a few iterations, one of which fails."""

import json
import re

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


def test_values_that_look_alike_get_folders_of_their_own():
    names = _folder_names(["1e-3", "1e+3", "[64, 32]", "rcca"])
    assert len(set(names.values())) == 4 and names["rcca"] == "rcca" and names["[64, 32]"] == "_64_32_"
    assert all(re.fullmatch(r"[A-Za-z0-9._]+", name) for name in names.values())
    again = _folder_names(["1e+3", "1e-3"])  # in another order, since finished runs are found by name
    assert all(names[value] == name for value, name in again.items())


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
    """10.5498 is 10.5, and not 10.6 by way of 10.550."""
    run = VariantRun(Variant("a", "a", ()), tmp_path, [], metrics={"sem_seg": {"mIoU": 10.549793716339142}})
    line = format_table({"key": CONTEXT, "rows": [_row("a", [run])]}).splitlines()[2]
    assert line == "| a | 10.5 | 0.0 | 10.5 | 10.5 | 1/1 | – |"
