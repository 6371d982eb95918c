"""Several processes on CPUs: gradients of one process, ends of all when one ends, and clear messages."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ccnet_d2.engine import launch as module
from ccnet_d2.engine.child_process import Report
from ccnet_d2.engine.command_line import main
from ccnet_d2.engine.launch import Processes, ProcessFailedError, _Child, _Supervisor, launch
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


@pytest.mark.parametrize(
    ("per_machine", "variable", "threads"), [(3, None, 2), (8, None, 1), (9, None, 1), (3, "5", 0)]
)
def test_place_and_threads_of_each_process(monkeypatch, per_machine, variable, threads):
    """The second of three machines, of 8 cores."""
    places = []

    class Process:
        def __init__(self, target, args, name):
            places.append(args[1])

        def start(self):
            pass

    context = SimpleNamespace(
        Process=Process, Pipe=lambda duplex: (None, SimpleNamespace(close=lambda: None))
    )
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    processes = Processes(per_machine, machines=3, machine_rank=1, url="tcp://h:1")
    _Supervisor(processes, SimpleNamespace(address=("h", 1))).start(print, (), timedelta(seconds=7))
    assert [place.local_rank for place in places] == list(range(per_machine))
    assert [place.rank for place in places] == list(range(per_machine, 2 * per_machine))
    told = {(p.world_size, p.machine_rank, p.threads, p.address, p.timeout, p.supervisor) for p in places}
    assert told == {(3 * per_machine, 1, threads, ("h", 1), timedelta(seconds=7), os.getpid())}


def ended(rank, exitcode, kind=None, when=0.0):
    """A process that has ended, with a report or without one."""
    process = SimpleNamespace(exitcode=exitcode, is_alive=lambda: False, join=lambda *_: None, sentinel=None)
    report = None if kind is None else Report(kind, f"{kind} error", status=exitcode, time=when)
    return _Child(rank, process, SimpleNamespace(closed=True), report)


def outcome(*children, asked_to_stop=0, elsewhere=None):
    """What a supervisor makes of such processes, and what it tells the other machines."""
    told = []
    machines = SimpleNamespace(
        report_failure=told.append,
        failure_elsewhere=lambda: elsewhere,
        finish=lambda: None,
        check=lambda: None,
    )
    supervisor = _Supervisor(Processes(len(children)), machines)
    supervisor._children = list(children)
    supervisor._asked_to_stop = asked_to_stop
    try:
        supervisor._wait()
    except (UserError, SystemExit) as error:
        return type(error), str(error), told
    return None, "", told


def test_the_first_cause_is_told_and_not_what_follows_from_it():
    lost = ended(0, 1, "lost", 1.0)
    late, early = ended(1, 1, "user", 3.0), ended(2, 1, "fault", 2.0)
    message = "Process 2 of 3 failed: fault error; the others were stopped."
    assert outcome(lost, late, early) == (ProcessFailedError, message, [message])
    assert outcome(lost, ended(1, 143, "exit"), late) == (UserError, "user error", ["user error"])
    # A process that could not report is the cause, whatever the others say.
    message = (
        "Process 1 of 2 was killed by SIGKILL (by the system if memory ran out); the others were stopped."
    )
    assert outcome(early, ended(1, -9)) == (ProcessFailedError, message, [message])
    message = "Process 1 of 2 ended with status 3 without telling why; the others were stopped."
    assert outcome(lost, ended(1, 3)) == (ProcessFailedError, message, [message])
    # What broke a connection is another machine, if that one says so.
    message = "Machine 1 failed: x. The processes of this machine were stopped."
    assert outcome(lost, ended(1, 0), elsewhere="Machine 1 failed: x.") == (ProcessFailedError, message, [])


def test_status_of_processes_that_end_of_themselves_or_as_asked():
    assert outcome(ended(0, 0), ended(1, 0)) == (None, "", [])
    assert outcome(ended(0, 0), ended(1, 5, "exit"))[:2] == (SystemExit, "5")
    # Killed by the signal that was passed on, which a process without a handler is.
    assert outcome(ended(0, 0), ended(1, -15), asked_to_stop=15)[:2] == (SystemExit, "143")
    assert outcome(ended(0, 0), ended(1, -9), asked_to_stop=15)[0] is ProcessFailedError
    assert outcome(ended(0, 0), ended(1, -15))[0] is ProcessFailedError


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
