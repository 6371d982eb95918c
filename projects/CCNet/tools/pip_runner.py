"""Run pip for the set-up scripts: progress as it happens, and one sentence when it fails.

Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class InstallError(RuntimeError):
    """A set-up step failed; the message is the one sentence to show to the user."""


# How install_detectron2.py, run by the set-up, ends when it fails: already a sentence.
OWN_FAILURE = re.compile(r"^install_detectron2: (?P<sentence>.+)\s*\Z", re.MULTILINE)

# pip's own wording -> what it means for the user. The first match wins, so causes come before consequences
# (a dead network also ends in "No matching distribution found").
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"No space left on device|Errno 28",
        "the disk is full: free some space (the environment needs about 8 GB, pip's cache and the temporary"
        " directory as much again while it is made) and run the command again",
    ),
    (
        r"DO NOT MATCH THE HASHES|Expected sha256",
        "a downloaded file does not have the expected sha256: the package index served something else;"
        " check the index that pip is configured for",
    ),
    (
        r"SSLError|CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError",
        "the package index's TLS certificate could not be verified: install ca-certificates, or point"
        " PIP_CERT at the certificates of your proxy",
    ),
    (
        r"NewConnectionError|Failed to establish a new connection|Name or service not known|ConnectionRefused"
        r"|Connection refused|Temporary failure in name resolution|Max retries exceeded|ConnectTimeout"
        r"|Read timed out|ReadTimeoutError|ProxyError|Network is unreachable|Connection reset|IncompleteRead"
        r"|Connection aborted|Connection broken|RemoteDisconnected|Could not resolve host|Failed to connect to",
        "the server that holds the packages cannot be reached: check the network (or the index and proxy that pip is"
        " configured for) and run the command again, it goes on where it stopped",
    ),
    (
        r"externally-managed-environment",
        "this Python is managed by the operating system: use a virtual environment",
    ),
    (r"No module named pip", "this Python has no pip: use a virtual environment made with pip"),
    (r"Permission denied|Errno 13", "a file or directory may not be written by this user"),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the wanted versions contradict each other",
    ),
)

# What pip says after a build that failed; why it did stands before.
_CONSEQUENCE = re.compile(
    r"(ERROR|error): (subprocess-exited-with-error|metadata-generation-failed|Failed (building|to build)\b)"
)


def explain_failure(output: str) -> str:
    """Return the cause of a pip failure as part of a sentence.

    Args:
        output: everything pip printed.

    Returns:
        A known cause in plain words, else the last error of pip or of a build, else the last line.
    """
    for pattern, meaning in _CAUSES:
        if re.search(pattern, output):
            return meaning
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if not _CONSEQUENCE.match(line)]
    for beginning, among in (
        (r"(ERROR|error|fatal):\s*", told),
        (r"(?=[\w.]+Error:)", told),  # what ended a build with a traceback
        (r"(ERROR|error):\s*", lines),
    ):
        errors = [line for line in among if re.match(beginning, line)]
        if errors:
            return re.sub(f"^{beginning}", "", errors[-1])
    return lines[-1] if lines else "pip printed nothing"


def pip_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment pip runs in: the user's own, minus what would change where things go."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")}
    environment.update(
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_NO_INPUT="1",
        PIP_ROOT_USER_ACTION="ignore",
    )
    environment.update(extra or {})
    return environment


def run_pip(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    what: str,
    python: str | os.PathLike[str] = sys.executable,
    log: Path | None = None,
    extra_env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run ``python -m pip`` and show what it downloads and installs as it happens.

    Args:
        arguments: what follows ``pip``.
        what: what is being done, for the error message ("installing torch").
        python: interpreter whose pip runs.
        log: file that receives all of pip's output.
        extra_env: environment variables on top of the user's.
        cwd: directory to run in.

    Returns:
        pip's whole output.

    Raises:
        InstallError: pip failed; the message is one sentence with the cause.
    """
    return run_command(
        [os.fspath(python), "-m", "pip", *(os.fspath(argument) for argument in arguments)],
        what=what,
        log=log,
        environment=pip_environment(extra_env),
        cwd=cwd,
    )


def run_command(
    command: Sequence[str],
    *,
    what: str,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command, echo its progress lines, keep all of its output; see :func:`run_pip`."""
    captured: list[str] = []
    sink = log.open("a", encoding="utf-8") if log else None
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            # A Python would write what it prints after its last error, and show no progress.
            env={**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"},
            cwd=cwd,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                captured.append(line)
                if sink:
                    sink.write(line)
                    sink.flush()
                _echo(line)
            code = process.wait()
        except BaseException:
            # Ctrl-C must not leave a pip behind that goes on writing into the environment.
            process.terminate()
            process.wait()
            raise
    except OSError as error:
        raise InstallError(f"{what} failed: {error.strerror or error} ({command[0]}).") from error
    finally:
        if sink:
            sink.close()
    output = "".join(captured)
    if code != 0:
        sentence = OWN_FAILURE.search(output)
        if sentence:
            raise InstallError(sentence["sentence"])
        where = f" All of the output is in {log}." if log else ""
        raise InstallError(f"{what} failed: {explain_failure(output).rstrip('.:')}.{where}")
    return output


def _echo(line: str) -> None:
    """Print the lines of pip that tell how far it is; the rest is only kept for the log."""
    text = line.strip()
    if not re.match(
        r"(Downloading|Building|Installing|Successfully installed|Successfully built|Attempting|Detectron2 )",
        text,
    ):
        return
    text = re.sub(r"\S*/(?=[^/\s]+\.(whl|tar\.gz|zip))", "", text)
    width = max(40, min(shutil.get_terminal_size((110, 24)).columns, 110) - 6)
    print("    " + (text if len(text) <= width else text[: width - 3] + "..."), flush=True)
