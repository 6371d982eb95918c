"""The input pipeline's benchmark, at a size at which it takes no time."""

import re
from types import ModuleType

import pytest
from detectron2.data import DatasetCatalog

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tools/benchmark_data.py")


@pytest.mark.parametrize(
    "arguments",
    ["--images 0", "--crop 0", "--batch 0", "--workers 0 -1", "--seconds 0", "--seconds nan", "--size 64 63"],
)
def test_nothing_to_measure_is_refused_before_measuring(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments.split())
    option, *_, value = arguments.split()
    assert f"argument {option}: '{value}' is no " in capsys.readouterr().err


def test_prints_stages_and_rates(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--size",
        "128",
        "256",
        "--crop",
        "65",
        "--seconds",
        "0.2",
        "--images",
        "2",
        "--workers",
        "0",
        "1",
    ]
    assert script.main(arguments) == 0
    out = capsys.readouterr().out
    times = {match[1]: float(match[2]) for match in re.finditer(r"^  (.+?) +([\d.]+) ms$", out, re.MULTILINE)}
    assert len(times) == 8 and "the whole mapper" in times and times["read and decode image"] > 0
    assert len(re.findall(r"worker.*: [\d.]+ images/s", out)) == 2
    assert script.main(["--dataset", "no_such_set"]) == 1
    DatasetCatalog.pop(script.NAME)
