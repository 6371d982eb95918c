"""Scripts that are interrupted, or whose output nobody reads any more, end quietly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[1]
_SCRIPTS = _REPOSITORY / "projects" / "CCNet"
# These run before there is an environment to import the package from.
_ALONE = {"install_detectron2.py", "setup_environment.py"}

_PROGRAM = """
import os, sys
from ccnet_d2.script_exit import exit_with

def main():
    {body}

exit_with(main)
"""


def run_into_closed_pipe(command, **environment):
    """Status, and what is on stderr, of a program whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *command],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_REPOSITORY,
            env={**os.environ, **environment},
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "body",
    ["print('little')", "print('much ' * 100_000)", "print('help'); raise SystemExit(0)"],
    ids=["little", "much", "parser"],
)
def test_closed_pipe_ends_quietly(body, unbuffered):
    status, printed = run_into_closed_pipe(["-c", _PROGRAM.format(body=body)], PYTHONUNBUFFERED=unbuffered)
    assert (status, printed) == (141, "")


def test_a_script_and_a_module_end_quietly():
    assert run_into_closed_pipe(["-m", "ccnet_d2.collect_env"]) == (141, "")
    assert run_into_closed_pipe(["projects/CCNet/tools/make_lip_fixture.py", "--help"])[1] == ""


@pytest.mark.parametrize(("redirection", "status"), [(">&-", 3), (">&- 2>&-", 3), ("2>&- | :", 141)])
def test_streams_that_are_closed_from_the_start(redirection, status, tmp_path):
    """As of a job that a daemon starts: there is nothing to print to, and nothing wrong."""
    program = tmp_path / "program.py"
    program.write_text(
        _PROGRAM.format(body="import time; time.sleep(0.5); print('much ' * 100_000); return 3")
    )
    shell = f'set -o pipefail; "$0" "$1" {redirection}'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, str(program)], capture_output=True, text=True, cwd=_REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_other_broken_pipes_keep_their_traceback():
    program = _PROGRAM.format(body="raise BrokenPipeError('of a worker')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError: of a worker" in done.stderr


def test_an_interrupted_script_ends_without_a_traceback():
    program = _PROGRAM.format(body="import time; print('begun', flush=True); time.sleep(60)")
    # What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
    program = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (130, "Interrupted.\n")


@pytest.mark.parametrize("result", [0, 3])
def test_status_is_that_of_main(result):
    done = subprocess.run([sys.executable, "-c", _PROGRAM.format(body=f"return {result}")])
    assert done.returncode == result


def test_every_script_ends_so():
    scripts = [*_SCRIPTS.rglob("*.py"), *(_REPOSITORY / "ccnet_d2").rglob("*.py")]
    programs = [path for path in scripts if 'if __name__ == "__main__":' in path.read_text()]
    assert len(programs) > 20
    others = {path.name for path in programs if "    exit_with(" not in path.read_text()}
    assert others == _ALONE
