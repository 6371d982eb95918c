"""Pictures written by several processes: the same files, and their troubles told."""

import functools
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.errors import UserError
from ccnet_d2.inference import Predictor, WholeImage, parallel
from ccnet_d2.inference.batch import plan_pictures, write_pictures
from ccnet_d2.inference.build import build_mode
from ccnet_d2.inference.parallel import _threads_each, write_pictures_on
from ccnet_d2.model_zoo import get_config
from tests.test_parent import is_running

TOY = "toy/ccnet_synthetic.py"
TWO_CPUS = [torch.device("cpu")] * 2
load = functools.partial(get_config, TOY)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": instantiate(get_config(TOY).model).state_dict()}, path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        size = (20 + 4 * index, 30, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.slow
def test_two_processes_write_what_one_writes(weights, photos, tmp_path):
    (photos / "2a.png").write_bytes((photos / "2.png").read_bytes()[:100])
    mode = build_mode("slide", tile=16)
    one = write_pictures(
        Predictor(TOY, weights, device="cpu", mode=mode), photos, tmp_path / "one", picture="labels"
    )
    jobs = plan_pictures(photos, tmp_path / "two", picture="labels")
    two = write_pictures_on(TWO_CPUS, load, weights, jobs, mode=mode)
    assert [path.name for path in two.written] == [path.name for path in one.written]
    assert [path.name for path in two.written] == [f"{index}.png" for index in range(5)]
    for first, second in zip(one.written, two.written, strict=True):
        assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    assert two.problems == one.problems and "2a.png" in two.problems[0]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        f"{index}.png" for index in range(5)
    ]


@pytest.mark.parametrize(
    ("devices", "threads"), [("cpu", 7), ("cpu cpu", 3), ("cpu " * 8, 1), ("cuda:0 cuda:1", 7)]
)
def test_processes_share_the_threads_of_this_one_and_not_the_machines(devices, threads, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        assert _threads_each([torch.device(device) for device in devices.split()]) == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_more_processes_than_images(weights, photos, tmp_path, monkeypatch, capfd):
    used = []
    monkeypatch.setattr(parallel, "_threads_each", lambda devices: used.append(len(devices)) or 1)
    jobs = plan_pictures(photos / "0.png", tmp_path / "out.png")
    result = write_pictures_on(TWO_CPUS, load, weights, jobs)
    assert used == [1] and "1/1 [" in capfd.readouterr().err
    assert result.written == [tmp_path / "out.png"] and Image.open(tmp_path / "out.png").size[0] >= 240


def test_processes_that_have_nothing_more_to_do_were_not_killed():
    """The other one is busy with the last image."""
    answers = [None, (0, "done")]

    def get(timeout):
        answer = answers.pop(0)
        if answer is None:
            raise queue.Empty
        return answer

    results = SimpleNamespace(get=get)
    workers = [SimpleNamespace(exitcode=code) for code in (0, None)]
    assert parallel._next_result(results, workers, TWO_CPUS) == (0, "done")
    workers[1].exitcode = 1
    answers[:] = [(0, "sent before"), None]
    assert parallel._next_result(results, workers, TWO_CPUS) == (0, "sent before")
    with pytest.raises(UserError, match=r"exit code 1\)"):
        parallel._next_result(results, workers, TWO_CPUS)
    workers[1].exitcode = 0
    answers[:] = [None]
    with pytest.raises(UserError, match=r"exit code 0\)"):
        parallel._next_result(results, workers, TWO_CPUS)


class Faulty(WholeImage):
    def predict_labels(self, *args):
        raise ZeroDivisionError("a fault of the program")


@pytest.mark.slow
def test_a_fault_of_a_process_has_its_traceback(weights, photos, tmp_path):
    jobs = plan_pictures(photos, tmp_path / "out")
    with pytest.raises(
        RuntimeError, match=r"(?s)process on cpu failed:\nTraceback.*in predict_labels.*ZeroDivi"
    ):
        write_pictures_on(TWO_CPUS[:1], load, weights, jobs, mode=Faulty(), progress=False)


@pytest.mark.slow
def test_mistakes_of_a_process_reach_the_user(weights, photos, tmp_path):
    jobs = plan_pictures(
        photos, tmp_path / "out", picture="attention", pixel=(0, 25)
    )  # outside of the smallest
    with pytest.raises(UserError, match=r"pixel \(0, 25\) lies outside the image of 30x2"):
        write_pictures_on(TWO_CPUS, load, weights, jobs, progress=False)
    with pytest.raises(UserError, match="no weights to predict with"):
        write_pictures_on(TWO_CPUS, load, None, jobs, progress=False)
    assert not [path for path in (tmp_path / "out").glob(".*")]  # nothing half-written


@pytest.mark.slow
def test_a_killed_process_is_reported(weights, photos, tmp_path):
    import torch.multiprocessing as multiprocessing

    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, 9)

    killer = threading.Thread(target=kill_one)
    killer.start()
    jobs = plan_pictures(photos, tmp_path / "out")
    with pytest.raises(UserError, match=r"the process on cpu was ended from outside \(exit code -9\)"):
        write_pictures_on(TWO_CPUS, load, weights, jobs, progress=False)
    killer.join()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ctrl_c_is_left_to_the_parent(weights, photos, tmp_path, capfd):
    """A terminal sends it to every process: each child would print a traceback of its own."""
    import torch.multiprocessing as multiprocessing

    def interrupt():
        while not (tmp_path / "out").is_dir():  # until then it may still be importing
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    jobs = plan_pictures(photos, tmp_path / "out")
    slow = build_mode("ms", scales=[1] * 15)
    result = write_pictures_on(TWO_CPUS[:1], load, weights, jobs, mode=slow, progress=False)
    interrupter.join()
    errors = capfd.readouterr().err
    assert len(result.written) == len(jobs) and "Traceback" not in errors and "image" not in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")
def test_processes_end_with_a_parent_that_is_killed(weights, photos, tmp_path):
    """Else they would go on to the last image, and keep their GPUs."""
    jobs = plan_pictures(photos, tmp_path / "out") * 10_000
    parent = torch.multiprocessing.get_context("spawn").Process(
        target=write_pictures_on,
        args=(TWO_CPUS, load, weights, jobs),
        kwargs={"progress": False},
    )
    parent.start()
    while not (tmp_path / "out").is_dir():
        assert parent.is_alive()
        time.sleep(0.01)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    try:
        parent.kill()
        parent.join()
        end = time.monotonic() + 30
        while any(map(is_running, children)) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(children) >= 2 and not any(map(is_running, children))
    finally:
        for child in filter(is_running, children):
            os.kill(int(child), signal.SIGKILL)
