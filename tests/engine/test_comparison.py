"""The processes of a comparison, with a program in the place of a training."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from ccnet_d2.engine import comparison
from ccnet_d2.engine.comparison import Variant, train_variants
from ccnet_d2.engine.overrides import apply_overrides
from ccnet_d2.errors import UserError
from ccnet_d2.model_zoo import get_config

NAMES = ("a", "b")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Function that has a shell script run for each training; $PLACE is the folder of the test."""

    def use(script):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\nPLACE={tmp_path}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return use


def train(folder):
    variants = [Variant(name, name, (f"name={name}",)) for name in NAMES]
    return train_variants("run.py", variants, folder / "out")


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_trainings_end_with_the_process_that_compares(stand_in, tmp_path, how):
    stand_in("echo $$ > $PLACE/pid.partial; mv $PLACE/pid.partial $PLACE/pid; exec sleep 100")
    process = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path,))
    process.start()
    assert wait_for((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    getattr(process, how)()
    process.join()
    assert wait_for(lambda: not is_running(pid))


def test_a_failure_waits_for_the_other_trainings_to_stop(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})  # both at once
    stand_in(
        "case $* in\n"
        "*name=a*) while [ ! -e $PLACE/waits ]; do sleep 0.05; done; echo error: it broke.; exit 1;;\n"
        "*) trap 'sleep 0.5; touch $PLACE/saved; exit 143' TERM; touch $PLACE/waits; while :; do sleep 0.05; done;;\n"
        "esac"
    )
    with pytest.raises(
        UserError, match=r"^Training of a failed: it broke \(whole output in .*train.log\)\.$"
    ):
        train(tmp_path)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (5, 1), (7, 2), (12, 4)])
def test_each_training_has_as_many_threads_as_the_others(stand_in, tmp_path, monkeypatch, cores, threads):
    """However many run at the moment: with another number the results are others in their last digits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(comparison, "_gpus", list)
    stand_in("echo $OMP_NUM_THREADS >> $PLACE/threads; exit 1")
    variants = [Variant(name, name, (f"name={name}",)) for name in "abc"]
    train_variants("run.py", variants, tmp_path / "out", stop_at_failure=False)
    assert (tmp_path / "threads").read_text().split() == [str(threads)] * 3


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ('{"bbox": {"AP": 1}, "segm": {"AP": 2}}', "holds bbox, segm"),
        (None, "is not there"),
        ('{"sem_seg": {"mIoU": null}}', "has none, as no pixel of the test set is labelled"),
        ('{"sem_seg": {"mIoU": NaN}}', "has none, as no pixel of the test set is labelled"),
    ],
)
def test_a_run_without_miou_is_a_failure(stand_in, tmp_path, evaluation, words):
    stand_in(f"echo '{evaluation}' > $PLACE/out/a/evaluation.json" if evaluation else "exit 0")
    (run,) = train_variants("run.py", [Variant("a", "a")], tmp_path / "out", stop_at_failure=False)
    assert run.error.startswith("Training of a ended without a mIoU") and words in run.error


def test_what_finished_with_the_same_arguments_is_kept_if_asked_for(stand_in, tmp_path):
    stand_in("""echo x >> $PLACE/trained; echo '{"sem_seg": {"mIoU": 50}}' > $PLACE/out/a/evaluation.json""")
    variants, trained = [Variant("a", "a")], tmp_path / "trained"
    for keep, overrides, trainings in (
        (True, ["seed=0"], 1),  # nothing to keep
        (True, ["seed=0"], 1),
        (True, ["seed=1"], 2),
        (False, ["seed=1"], 3),
    ):
        (run,) = train_variants("run.py", variants, tmp_path / "out", overrides=overrides, keep_finished=keep)
        assert (run.error, run.miou) == (None, 50.0) and run.seconds > 0
        assert len(trained.read_text().split()) == trainings


def test_seconds_are_those_of_the_training_also_when_it_is_kept(stand_in, tmp_path):
    stand_in("""sleep 1.5; echo '{"sem_seg": {"mIoU": 50}}' > $PLACE/out/a/evaluation.json""")
    runs = [
        *train_variants("run.py", [Variant("a", "a")], tmp_path / "out"),
        *train_variants("run.py", [Variant("a", "a")], tmp_path / "out", keep_finished=True),
    ]
    assert 1.5 <= runs[0].seconds < 30 and runs[1].seconds == runs[0].seconds


def test_an_evaluation_that_came_later_changes_nothing(stand_in, tmp_path):
    """As one in another test mode, in the run's folder."""
    stand_in("""echo x >> $PLACE/trained; echo '{"sem_seg": {"mIoU": 50}}' > $PLACE/out/a/evaluation.json""")
    for miou in ("60", "null"):
        (run,) = train_variants("run.py", [Variant("a", "a")], tmp_path / "out", keep_finished=True)
        assert run.miou == 50
        (tmp_path / "out/a/evaluation.json").write_text(f'{{"sem_seg": {{"mIoU": {miou}}}}}')
    assert len((tmp_path / "trained").read_text().split()) == 1


@pytest.mark.parametrize(("miou", "kept"), [("60", True), ("null", False)])
def test_what_older_versions_finished_is_kept_where_it_has_a_miou(stand_in, tmp_path, miou, kept):
    """They left the results in evaluation.json alone."""
    stand_in("""echo '{"sem_seg": {"mIoU": 50}}' > $PLACE/out/a/evaluation.json""")
    train_variants("run.py", [Variant("a", "a")], tmp_path / "out")
    finished = tmp_path / "out/a/finished.json"
    record = json.loads(finished.read_text())
    del record["metrics"]
    finished.write_text(json.dumps({**record, "seconds": 7.0}))
    (tmp_path / "out/a/evaluation.json").write_text(f'{{"sem_seg": {{"mIoU": {miou}}}}}')
    (run,) = train_variants("run.py", [Variant("a", "a")], tmp_path / "out", keep_finished=True)
    assert (run.miou, run.seconds == 7.0) == (60 if kept else 50, kept)


def test_a_variant_s_overrides_come_after_those_of_all(stand_in, tmp_path):
    stand_in("exit 1")
    variants = [Variant("a", "a", ("key=2",))]
    (run,) = train_variants("run.py", variants, tmp_path, overrides=["key=1"], stop_at_failure=False)
    assert run.arguments == [
        "--config-file",
        "run.py",
        "key=1",
        "key=2",
        f"train.output_dir={tmp_path / 'a'}",
    ]


def test_results_of_an_earlier_run_do_not_pass_for_this_one_s(stand_in, tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/evaluation.json").write_text('{"sem_seg": {"mIoU": 50}}')
    stand_in("exit 0")
    (run,) = train_variants("run.py", [Variant("a", "a")], tmp_path / "out", stop_at_failure=False)
    assert "is not there" in run.error


@pytest.mark.parametrize("text", ["", '{"arguments": ['])
def test_what_was_written_in_part_is_trained_again(stand_in, tmp_path, text):
    stand_in("""echo '{"sem_seg": {"mIoU": 50}}' > $PLACE/out/a/evaluation.json""")
    (tmp_path / "out/a").mkdir(parents=True)
    for name in ("finished.json", "evaluation.json"):
        (tmp_path / "out/a" / name).write_text(text)
    (run,) = train_variants("run.py", [Variant("a", "a")], tmp_path / "out", keep_finished=True)
    assert run.miou == 50.0


def test_each_training_has_a_gpu_and_the_environment(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_gpus", lambda: ["GPU-8d"])
    stand_in("echo $CUDA_VISIBLE_DEVICES $SETS >> $PLACE/seen; exit 1")
    variants = [Variant(name, name) for name in NAMES]
    train_variants("run.py", variants, tmp_path / "out", environment={"SETS": "here"}, stop_at_failure=False)
    assert (tmp_path / "seen").read_text() == "GPU-8d here\n" * 2


def test_progress_of_a_training(tmp_path):
    run = comparison.VariantRun(Variant("a", "A"), tmp_path, [])
    assert run.progress() == "a: starting"
    lines = ['{"iteration": 9}', '{"iteration": 19, "total_loss": 1.5, "eta_seconds": 90.0}', '{"iter']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert run.progress() == "a: iteration 20, loss 1.500, 1.5 min left"


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-8d, GPU-3c, -1", ["GPU-8d", "GPU-3c"])],
)
def test_gpus_are_those_that_the_user_allowed(monkeypatch, variable, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(comparison.torch.cuda, "device_count", lambda: 2)
    assert comparison._gpus() == gpus


@pytest.mark.parametrize(
    "name", ["plain-1.0", "a b", "a,b", "a=b", "run (1)", "ünï", "[x]", "it's", 'say "so"']
)
def test_folders_of_any_name(stand_in, tmp_path, name):
    stand_in("exit 1")
    (run,) = train_variants("run.py", [Variant("a", "a")], tmp_path / name, stop_at_failure=False)
    cfg = apply_overrides(get_config("toy/ccnet_synthetic.py"), run.arguments[2:])
    assert cfg.train.output_dir == str(tmp_path / name / "a")
