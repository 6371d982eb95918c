"""The input pipeline's benchmark, at a size at which it takes no time."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.data import DatasetCatalog

from tests.clock import Clock
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


@pytest.mark.parametrize("source", ["--dataset", "--config-file"])
def test_a_size_goes_with_made_up_images_alone(
    script: ModuleType, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    with pytest.raises(SystemExit):
        script.main([source, "camvid_sem_seg_train", "--size", "64", "64"])
    assert "--size is of made-up images" in capsys.readouterr().err
    assert tuple(script.parse([]).size) == (1024, 2048)


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


@pytest.mark.usefixtures("catalogs_as_before")
def test_a_data_set_of_one_s_own_is_found_through_the_run_that_registers_it(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_street(str(tmp_path), 2, 64, 64)
    config = tmp_path / "my_run.py"
    config.write_text(f"""
from ccnet_d2.data import register_sem_seg_folder
from ccnet_d2.model_zoo import get_config

classes = [str(i) for i in range({script.CLASSES})]
register_sem_seg_folder("my_train", "{tmp_path}/images", "{tmp_path}/labels", classes)
_run = get_config("toy/ccnet_synthetic.py")
model, dataloader, train = _run.model, _run.dataloader, _run.train
dataloader.train.dataset.names = "my_train"
""")
    options = ["--crop", "33", "--seconds", "0.1", "--images", "2", "--workers", "0"]
    assert script.main(["--config-file", str(config), *options]) == 0
    assert capsys.readouterr().out.startswith("my_train: ")
    assert script.main(["--config-file", "coco/mask_rcnn_R_50_FPN_1x.py", *options]) == 1
    assert script.main(["--config-file", str(tmp_path / "nothing.py"), *options]) == 1
    assert "There is no config" in capsys.readouterr().err


@pytest.fixture
def clock(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(script, "time", clock)
    return clock


def test_a_stage_s_time_is_that_of_one_image(script: ModuleType, clock: Clock) -> None:
    assert script.milliseconds(lambda index: clock.wait(0.25 * (1 + index)), 3) == pytest.approx(500)


@pytest.mark.parametrize(("workers", "free"), [(0, 2), (1, 2), (3, 6)])
def test_rate_counts_images_and_leaves_out_the_start(
    script: ModuleType, clock: Clock, monkeypatch: pytest.MonkeyPatch, workers: int, free: int
) -> None:
    given = {}

    def load(dataset: list[dict], **options: object) -> Iterator[None]:
        given.update(options)
        for index in itertools.count():
            clock.wait(50.0 if index < free else 0.5)
            yield

    monkeypatch.setattr(script, "build_detection_train_loader", load)
    monkeypatch.setattr(script, "SemSegMapper", lambda *_, **__: None)
    # Batches of 6 in half a second each.
    assert script.images_per_second([], "none", 65, workers, 6, 3.0) == pytest.approx(12)
    assert (given["total_batch_size"], given["num_workers"]) == (6, workers)
