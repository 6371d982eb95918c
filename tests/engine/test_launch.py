"""Several processes on CPUs: gradients of one process, ends of all when one ends, and clear messages."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from ccnet_d2.engine.command_line import main
from ccnet_d2.engine.launch import Processes, ProcessFailedError, launch
from ccnet_d2.engine.network import interface_to
from ccnet_d2.errors import UserError
from tests.engine import rank_programs as programs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folder in which two processes left their gradients in fp64."""
    folder = tmp_path_factory.mktemp("two")
    launch(programs.gradients, Processes(2), (str(folder), "float64"))
    return folder


@pytest.mark.parametrize("case", programs.CASES)
def test_gradients_are_those_of_one_process(two_processes, case):
    ours = torch.load(two_processes / f"{case}.pt")
    alone = "" if case == "recompute" else case  # by attention that keeps everything
    single = programs.losses_and_gradients(programs.make_model(case=alone), programs.make_batch(case))
    torch.testing.assert_close(ours["loss"], single["loss"], rtol=1e-12, atol=1e-14)
    assert max(programs.relative_errors(ours, single)) < 1e-10
    for name, buffer in single["buffers"].items():  # running statistics
        torch.testing.assert_close(ours["buffers"][name], buffer, rtol=1e-12, atol=1e-12)
    assert all(g.isfinite().all() for g in ours["gradients"].values())
    if case != "all ignored":
        assert any(g.abs().max() > 0 for g in ours["gradients"].values())


@pytest.mark.slow
def test_gradients_of_four_processes(tmp_path):
    launch(programs.gradients, Processes(4), (str(tmp_path), "float64"))
    for case in programs.CASES:
        single = programs.losses_and_gradients(programs.make_model(case=case), programs.make_batch(case))
        assert max(programs.relative_errors(torch.load(tmp_path / f"{case}.pt"), single)) < 1e-10, case


@pytest.mark.slow
def test_batch_norm_over_processes_with_uneven_batches(tmp_path):
    launch(programs.batch_norm, Processes(2), (str(tmp_path),))
    assert (tmp_path / "right").exists()


@pytest.mark.slow
def test_category_consistent_loss_is_finite(tmp_path):
    launch(programs.category_consistent, Processes(2), (str(tmp_path),))
    assert (tmp_path / "finite").exists()


@pytest.mark.slow
def test_wrong_input_is_the_same_sentence(capfd):
    with pytest.raises(UserError, match=r"^The image 'a.png' is cut off\.$"):
        launch(programs.wrong_input_on_one, Processes(2))
    with pytest.raises(UserError, match=r"^train.max_itr is not a key\.$"):
        launch(programs.wrong_input_on_all, Processes(2))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_fault_shows_its_traceback_and_not_those_that_follow(capfd):
    with pytest.raises(ProcessFailedError, match="Process 1 of 2 failed: ZeroDivisionError"):
        launch(programs.fault_on_one, Processes(2))
    errors = capfd.readouterr().err
    assert errors.count("Traceback") == 1 and "fault_on_one" in errors


@pytest.mark.slow
@pytest.mark.parametrize("deaf", [False, True])
def test_killed_process_ends_the_run(tmp_path, deaf):
    with pytest.raises(ProcessFailedError, match="Process 1 of 2 was killed by SIGKILL"):
        launch(programs.killed, Processes(2), (str(tmp_path), deaf))
    assert time.time() - float((tmp_path / "killed_at").read_text()) < 60


@pytest.mark.slow
def test_sigterm_is_passed_on(tmp_path):
    def ask() -> None:
        while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        launch(programs.stop_on_sigterm, Processes(2), (str(tmp_path),))
    assert end.value.code == 143
    assert all((tmp_path / f"saved_{rank}").exists() for rank in range(2))
    assert signal.getsignal(signal.SIGTERM) == before


_MACHINE = """
import sys
from ccnet_d2.engine.launch import Processes, launch
from ccnet_d2.engine.user_errors import one_sentence_errors
from tests.engine import rank_programs

if __name__ == "__main__":
    program, count, machines, rank, port, *args = sys.argv[1:]
    with one_sentence_errors() as status:
        processes = Processes(int(count), "cpu", int(machines), int(rank), f"tcp://127.0.0.1:{port}")
        launch(getattr(rank_programs, program), processes, args)
    sys.exit(status.code)
"""


@pytest.fixture
def machines(tmp_path, free_port):
    """Starts a program on two "machines" of this one; gives each one's status, output and errors."""
    script = tmp_path / "machine.py"
    script.write_text(_MACHINE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}

    def run(program, *args, counts=(1, 1), ranks=(0, 1)):
        started = [
            subprocess.Popen(
                [sys.executable, script, program, str(count), "2", str(rank), str(free_port), *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank, count in zip(ranks, counts, strict=True)
        ]
        try:
            ends = [process.communicate(timeout=180) for process in started]
        finally:
            for process in started:
                process.kill()
        return [(process.returncode, *end) for process, end in zip(started, ends, strict=True)]

    return run


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_machines(machines):
    ends = machines("say_who", counts=(2, 2))
    assert [status for status, _, _ in ends] == [0, 0], ends
    lines = [json.loads(line) for _, output, _ in ends for line in output.splitlines()]
    lines.sort(key=lambda line: line["rank"])
    assert [line["local_rank"] for line in lines] == [0, 1, 0, 1]
    assert all(line["local_size"] == 2 and line["sum"] == 4 for line in lines)
    assert all(line["gathered"] == [0, 1, 2, 3] for line in lines)


@pytest.mark.slow
def test_a_failure_ends_the_other_machine_with_its_reason(machines, tmp_path):
    first, second = machines("killed", str(tmp_path))
    assert first[0] == second[0] == 1
    assert time.time() - float((tmp_path / "killed_at").read_text()) < 60
    assert "error: Process 1 of 2 (on machine 1) was killed by SIGKILL" in second[2]
    assert "error: Machine 1 failed: Process 1 of 2 (on machine 1) was killed by SIGKILL" in first[2]

    first, second = machines("wrong_input_on_one")
    assert "error: The image 'a.png' is cut off." in second[2]
    assert "error: Machine 1 failed: The image 'a.png' is cut off." in first[2]


@pytest.mark.slow
def test_machines_that_do_not_fit_together(machines):
    ends = machines("say_who", counts=(1, 2))
    assert all(status == 1 for status, _, _ in ends)
    assert any("2 machines with 1 processes each" in errors for _, _, errors in ends)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (dict(per_machine=0), "at least one"),
        (dict(per_machine=1, machines=2, machine_rank=2, url="tcp://h:1"), "--machine-rank 2"),
        (dict(per_machine=1, machines=2), "--dist-url tcp://HOST:PORT"),
        (dict(per_machine=2, url="file:///x"), "file:///x"),
        (dict(per_machine=2, url="tcp://host"), "tcp://host"),
        (dict(per_machine=2, url="tcp://host:port"), "tcp://host:port"),
        (dict(per_machine=torch.cuda.device_count() + 1, device="cuda"), "GPUs"),
    ],
)
def test_wrong_numbers(numbers, words):
    with pytest.raises(UserError, match=words):
        Processes(**numbers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what to do without a GPU")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-gpus", "2"], "--num-processes"),
        (["--num-machines", "2"], "--num-processes"),
        (["--num-gpus", "2", "--num-processes", "2"], "together"),
        (["--num-processes", "0"], "at least one"),
        (["--num-processes", "1", "--num-machines", "2"], "--dist-url"),
    ],
)
def test_wrong_command_line(capsys, arguments, words):
    assert main(["--config-file", "toy/ccnet_synthetic.py", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error


def test_torchrun_says_how_many_processes_there_are(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert main(["--config-file", "toy/ccnet_synthetic.py", "--num-processes", "2"]) == 1
    assert "leave out" in capsys.readouterr().err


def test_taken_port(free_port):
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port))
        server.listen()
        with pytest.raises(UserError, match=f"Port {free_port} .* in use"):
            launch(programs.say_who, Processes(2, url=f"tcp://127.0.0.1:{free_port}"))


def test_one_process_is_this_one():
    seen = []
    launch(seen.append, Processes(1), (os.getpid(),))
    assert seen == [os.getpid()]


def test_loopback_leads_to_this_machine():
    assert interface_to("127.0.0.1") == interface_to("127.0.0.2") == "lo"
    assert interface_to("no.such.host.invalid") is None
