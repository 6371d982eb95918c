"""run_demo.py: what the command line makes of the demo; tests/engine/test_demo_report.py has the demo itself."""

from pathlib import Path

import pytest

from ccnet_d2.errors import UserError
from tests.scripts import load_script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ("synthetic", Path("output/demo"), 0, [])),
        (
            "--dataset camvid --output there --seed 7 train.max_iter=3 train.num_pictures=0",
            ("camvid", Path("there"), 7, ["train.max_iter=3", "train.num_pictures=0"]),
        ),
    ],
)
def test_the_demo_gets_what_the_command_line_says(monkeypatch, words, expected):
    script = load_script("tools/run_demo.py")
    given = []
    monkeypatch.setattr(
        script,
        "run_demo",
        lambda dataset, output, *, seed, overrides: given.append((dataset, output, seed, overrides)),
    )
    assert script.main(words.split()) == 0
    assert given == [expected]


def test_one_sentence(monkeypatch, capsys):
    script = load_script("tools/run_demo.py")

    def fail(*_, **__):
        raise UserError("Training of fcn failed.")

    monkeypatch.setattr(script, "run_demo", fail)
    assert script.main([]) == 1
    assert capsys.readouterr().err == "error: Training of fcn failed.\n"
