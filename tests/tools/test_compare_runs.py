"""compare_runs.py: what the command line makes of a comparison; tests/engine/test_compare_runs.py has the rest."""

from pathlib import Path

import pytest

from tests.scripts import load_script

CONTEXT = "model.sem_seg_head.context"


@pytest.mark.parametrize(
    ("more", "key", "seeds", "overrides"),
    [
        ("", CONTEXT, [0], []),
        (
            "--seeds 3 1 2 --key optimizer.lr -- train.max_iter=9",
            "optimizer.lr",
            [3, 1, 2],
            ["train.max_iter=9"],
        ),
    ],
)
def test_runs_and_table(monkeypatch, capsys, more, key, seeds, overrides):
    script = load_script("tools/compare_runs.py")
    given = []

    def compare(*values, **named):
        given.append((*values, named))
        row = {"value": "0.1", "miou": [40.0, None, 50.0], "mean": 45.0, "deviation": 5.0}
        return {"key": key, "rows": [{**row, "seconds_per_iteration": 0.25}]}

    monkeypatch.setattr(script, "compare_runs", compare)
    words = f"--config-file toy.py --values 0.1 0.2 --output out {more}"
    assert script.main(words.split()) == 0
    assert given == [("toy.py", key, ["0.1", "0.2"], Path("out"), {"seeds": seeds, "overrides": overrides})]
    out = capsys.readouterr().out
    assert "| 0.1 | 45.0 | 5.0 | 40.0 | 50.0 | 2/3 | 0.250 |" in out and "out/table.md" in out
