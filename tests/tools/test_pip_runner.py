"""pip's failures as one sentence."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import pip_runner
from pip_runner import InstallError


@pytest.mark.parametrize(
    ("output", "meaning"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n"
            "ERROR: No matching distribution found for torch",
            "cannot be reached",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "expected sha256"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "certificate"),
        ("error: externally-managed-environment", "virtual environment"),
        ("/usr/bin/python3: No module named pip", "no pip"),
        ("ERROR: ResolutionImpossible: for help visit", "contradict"),
        ("Collecting a\nERROR: Invalid requirement: '??'\n", "Invalid requirement: '??'"),
        ("ERROR: Failed to build 'a'\nWARNING: b\n  error: no room for c\n", "no room for c"),
        ("Traceback\nValueError: something new\n", "ValueError: something new"),
        (
            "  error: csrc/cpu was not built: no C++ compiler\n  error: subprocess-exited-with-error\n"
            "  ERROR: Failed building wheel for a\nFailed to build a\nERROR: Failed to build one or more wheels\n",
            "csrc/cpu was not built: no C++ compiler",
        ),
        (
            "  Traceback (most recent call last):\n  distutils.errors.SetupError: A=b is unknown\n"
            "  error: subprocess-exited-with-error\nerror: metadata-generation-failed\nhint: See above for details.\n",
            "distutils.errors.SetupError: A=b is unknown",
        ),
        ("ERROR: Failed to build 'a'\nhint: none\n", "Failed to build 'a'"),
        ("", "pip printed nothing"),
    ],
)
def test_causes(output: str, meaning: str) -> None:
    explanation = pip_runner.explain_failure(output)
    assert meaning in explanation and "\n" not in explanation


def test_failing_command_keeps_its_output_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of the command before\n")
    program = (
        "import sys; print('first'); print('ERROR: it broke.', file=sys.stderr);"
        r"sys.stdout.buffer.write(b'caf\xe9\n'); sys.exit(3)"
    )
    with pytest.raises(InstallError) as error:
        pip_runner.run_command([sys.executable, "-c", program], what="The work", log=log)
    assert str(error.value) == f"The work failed: it broke. All of the output is in {log}."
    before, *lines = log.read_text().splitlines()
    assert before == "of the command before" and sorted(lines) == ["ERROR: it broke.", "caf\ufffd", "first"]


def test_command_is_ended_where_its_reader_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def interrupt(line: str) -> None:
        told.append(int(line))
        raise KeyboardInterrupt

    monkeypatch.setattr(pip_runner, "_echo", interrupt)
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(20)"
    with pytest.raises(KeyboardInterrupt):
        pip_runner.run_command([sys.executable, "-c", program], what="The work")
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


def test_sentence_of_our_own_script_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = "import sys; print('noise'); sys.exit('install_detectron2: There is no such thing.')"
    with pytest.raises(InstallError, match=r"^There is no such thing\.$"):
        pip_runner.run_command([sys.executable, "-c", program], what="The work")


def test_command_that_does_not_exist() -> None:
    with pytest.raises(
        InstallError, match=r"The work failed: No such file or directory \(/nonexistent/python\)"
    ):
        pip_runner.run_command(["/nonexistent/python"], what="The work")


def test_only_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "print('Collecting a'); print('  Downloading https://x/y/a-1-py3-none-any.whl (3 MB)'); print('done')"
    )
    output = pip_runner.run_command([sys.executable, "-c", program], what="The work")
    assert output.count("\n") == 3
    assert capsys.readouterr().out == "    Downloading a-1-py3-none-any.whl (3 MB)\n"


def test_environment_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_TARGET", "PIP_PREFIX", "PYTHONHOME"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mine.example/simple")
    environment = pip_runner.pip_environment({"TMPDIR": "/var/tmp"})
    assert "/elsewhere" not in environment.values()
    assert environment["PIP_INDEX_URL"] == "https://mine.example/simple"
    assert environment["TMPDIR"] == "/var/tmp"
