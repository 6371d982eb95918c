"""The set-up of .venv: stages, stamps, resuming, and what it refuses. Environments are made for real, offline."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import setup_environment
from pip_runner import InstallError
from setup_environment import Environment, Stage, hash_of

ROOT = Path(__file__).resolve().parents[2]


def make_borrowing_environment(directory: Path) -> None:
    """A real environment that uses this one's packages, pip included: made in no time."""
    venv.create(directory, with_pip=False, symlinks=True)
    (site_packages,) = (directory / "lib").glob("python*/site-packages")
    (site_packages / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


class Recorded(Environment):
    """An environment whose stages, after the real environment itself, only note that they ran."""

    def __init__(self, root: Path, **keywords: bool) -> None:
        super().__init__(root, **keywords)
        self.ran: list[str] = []
        self.wish: dict[str, str] = {}
        self.failing = ""
        self.borrow_pip = False

    def create(self) -> None:
        if self.borrow_pip:
            make_borrowing_environment(self.venv)
        else:
            super().create()

    def stages(self) -> list[Stage]:
        def stage(name: str, *inputs: str, wishes: dict[str, str] | None = None) -> Stage:
            def run() -> None:
                self.ran.append(name)
                assert not list(self.temporary.iterdir())
                if name == self.failing:
                    raise InstallError(f"{name} failed")

            return Stage(name, name, run, hash_of(self.root, inputs), wishes or {})

        return [stage("first", "a.txt"), stage("second", "csrc", wishes=self.wish), stage("check")]


@pytest.fixture(scope="module", autouse=True)
def little_is_enough() -> Iterator[None]:
    """These stages install nothing: the disk may be nearly full, and where Python brings pip no other is looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup_environment, "NEEDED_BYTES", 10**8)
        patch.setattr(setup_environment, "get_pip_wheel", None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose environment and stages are complete."""
    if importlib.util.find_spec("ensurepip") is None:
        pytest.skip("without ensurepip, pip comes from the network")
    root = tmp_path_factory.mktemp("root")
    (root / "a.txt").write_text("1")
    (root / "csrc").mkdir()
    environment = Recorded(root)
    assert environment.run()
    assert environment.ran == ["first", "second", "check"]
    return root


@pytest.fixture
def root(finished: Path) -> Path:
    """The finished root, brought back to its finished state."""
    (finished / "a.txt").write_text("1")
    shutil.rmtree(finished / "csrc")
    (finished / "csrc").mkdir()
    Recorded(finished).run()
    return finished


def test_second_run_does_nothing_at_once(root: Path) -> None:
    environment = Recorded(root)
    start = time.monotonic()
    assert not environment.run()
    assert environment.ran == []
    assert time.monotonic() - start < 5


def test_environment_has_pip_of_its_own(root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    result = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    assert str(root / ".venv") in result.stdout
    assert Recorded(root).venv_version() == sys.version_info[:2]


def test_changed_input_runs_its_stage_and_the_check(root: Path) -> None:
    (root / "csrc" / "new.cpp").write_text("int f();")
    environment = Recorded(root)
    assert environment.run()
    assert environment.ran == ["second", "check"]


def test_wish_counts_when_it_is_new_and_stays_when_it_is_left_out(root: Path) -> None:
    for wish, expected in [
        ({"FORCE_CUDA": "1"}, ["second", "check"]),
        ({"FORCE_CUDA": "1"}, []),
        ({}, []),
        ({"FORCE_CUDA": "0"}, ["second", "check"]),
    ]:
        environment = Recorded(root)
        environment.wish = wish
        environment.run()
        assert environment.ran == expected


def test_every_variable_of_the_build_is_a_wish() -> None:
    """A build that failed of one, such as of too many jobs at once, is tried again when it is set."""
    told = (ROOT / "setup.py").read_text().partition("Environment variables:")[2].partition('"""')[0]
    names = set(re.findall(r"\b(?:CCNET_EXT|CXX|[A-Z]+_[A-Z_]+|[A-Z]+FLAGS)\b", told))
    assert {"MAX_JOBS", "NVCC_CCBIN", "CXXFLAGS", "TORCH_CUDA_ARCH_LIST"} <= names
    assert names <= set(setup_environment.BUILD_VARIABLES)


def test_failed_stage_is_run_again(root: Path) -> None:
    (root / "a.txt").write_text("2")
    environment = Recorded(root)
    environment.failing = "first"
    with pytest.raises(InstallError, match="first failed"):
        environment.run()
    assert environment.ran == ["first"]
    again = Recorded(root)
    assert again.run()
    assert again.ran == ["first", "check"]
    assert not again.working.exists() and not again.temporary.exists()


def test_failure_of_an_unchanged_stage_leaves_no_old_stamp(root: Path) -> None:
    environment = Recorded(root)
    environment.wish, environment.failing = {"FORCE_CUDA": "2"}, "second"
    with pytest.raises(InstallError):
        environment.run()
    # Without the wish the stage would count as done, were its stamp still there.
    again = Recorded(root)
    again.run()
    assert again.ran == ["second", "check"]


def test_damaged_stamp_is_no_stamp(root: Path) -> None:
    environment = Recorded(root)
    environment.stamp(environment.stages()[0]).write_text("{")
    environment.run()
    assert environment.ran == ["first", "check"]


def test_interrupted_stage_is_repaired(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Recorded(root)
    environment.stamp(environment.stages()[0]).unlink()
    environment.working.touch()
    environment.temporary.mkdir()
    (environment.temporary / "pip-unpack-left").mkdir()
    (site_packages,) = (root / ".venv" / "lib").glob("python*/site-packages")
    (site_packages / "half-1.0.dist-info").mkdir()
    (site_packages / "half-1.0.dist-info" / "METADATA").write_text("Name: half\n")
    (site_packages / "~ld").mkdir()
    (site_packages / "~nk").symlink_to(site_packages / "pip")
    environment.run()
    assert environment.ran == ["first", "check"]
    assert not (site_packages / "half-1.0.dist-info").exists() and not (site_packages / "~ld").exists()
    assert list(site_packages.glob("pip-*.dist-info")), "a complete distribution was removed"
    assert (site_packages / "pip").is_dir() and not (site_packages / "~nk").is_symlink()
    assert not environment.temporary.exists()
    assert "half-1.0.dist-info, ~ld, ~nk" in capsys.readouterr().out
    environment.working.touch()  # interrupted before there was a temporary file
    Recorded(root).run()
    assert capsys.readouterr().out == ""


def test_half_made_or_moved_environment_is_remade(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, symlinks=True)
    environment = Recorded(moved)
    environment.borrow_pip = True
    assert environment.run()
    assert environment.ran == ["first", "second", "check"]
    assert str(moved) in (moved / ".venv" / "bin" / "activate").read_text()
    assert not environment.discarded.exists()

    for first in (False, True):
        environment.unfinished.touch()
        if first:  # of all times, when nothing says yet where it was made
            (environment.state / "place").unlink()
        (environment.venv / "left-over").touch()
        again = Recorded(moved)
        again.borrow_pip = True
        again.run()
        assert again.ran == ["first", "second", "check"]
        assert not (again.venv / "left-over").exists() and not again.unfinished.exists()


def test_environment_that_was_put_aside_is_deleted_by_the_next_run(root: Path, tmp_path: Path) -> None:
    discarded = Recorded(root).discarded
    (discarded / "lib").mkdir(parents=True)
    assert not Recorded(root).run() and not discarded.exists()
    (tmp_path / "precious").touch()
    discarded.symlink_to(tmp_path)
    assert not Recorded(root).run() and not discarded.is_symlink()
    assert (tmp_path / "precious").exists()


def test_environment_of_another_python_is_kept_where_none_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").touch()
    another = (3, 10 if sys.version_info[1] != 10 else 11)
    for version, chosen, remade in [
        (None, False, True),  # the first time
        (another, False, False),
        (another, True, True),
        (sys.version_info[:2], True, False),
        ((3, 9), False, True),
    ]:
        environment = Recorded(tmp_path, chosen_python=chosen)
        environment.borrow_pip = True
        monkeypatch.setattr(environment, "venv_version", lambda version=version: version)
        assert environment.run() == remade
        assert environment.ran == (["first", "second", "check"] if remade else [])


def test_environment_without_pip_is_of_no_use(tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=True)
    assert Recorded(tmp_path).venv_version() is None
    make_borrowing_environment(tmp_path / ".venv")
    assert Recorded(tmp_path).venv_version() == sys.version_info[:2]


def test_pip_where_python_brings_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real wheel of pip makes a real environment; only where the wheel comes from is replaced."""
    ensurepip = pytest.importorskip("ensurepip")
    folder = sysconfig.get_config_var("WHEEL_PKG_DIR") or Path(ensurepip.__file__).parent / "_bundled"
    (bundled,) = Path(folder).glob("pip-*.whl")
    find_spec, run_command = importlib.util.find_spec, setup_environment.run_command
    ran = []

    def run(command: list[str], **keywords: object) -> str:
        ran.append(command)
        assert keywords["log"] == environment.log
        return run_command(command, **keywords)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name)
    )
    monkeypatch.setattr(setup_environment, "run_command", run)
    monkeypatch.setattr(
        setup_environment, "get_pip_wheel", lambda folder: Path(shutil.copy(bundled, folder / bundled.name))
    )
    environment = Environment(tmp_path)
    assert environment.make_venv(6)
    assert "--without-pip" in ran[0] and environment.venv_version() == sys.version_info[:2]
    assert sorted(path.name for path in environment.state.iterdir()) == ["place"]


def test_python_without_venv_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallError, match=r"lacks the module venv: apt install python3-venv\."):
        Environment(tmp_path).create()
    assert list(tmp_path.iterdir()) == []


def test_environment_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").write_text("precious")
    with pytest.raises(InstallError, match=r"was not made by this set-up.*move it away"):
        Recorded(tmp_path).run()
    assert (tmp_path / ".venv" / "mine").read_text() == "precious"
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["mine"]

    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".venv").symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(InstallError, match=r"was not made by this set-up.*move it away"):
        Recorded(tmp_path / "linked").run()
    assert (tmp_path / "linked" / ".venv").is_symlink()


def test_usable_environment_of_somebody_else_is_used(tmp_path: Path) -> None:
    make_borrowing_environment(tmp_path / ".venv")
    (tmp_path / ".venv" / "mine").touch()
    (tmp_path / "a.txt").touch()
    environment = Recorded(tmp_path)
    environment.run()
    assert environment.ran == ["first", "second", "check"]
    assert (tmp_path / ".venv" / "mine").exists()


def test_wrong_python_is_named_before_anything_is_touched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InstallError, match=r"/usr/bin/python3\.9 is Python 3\.9, and the project needs Python 3\.10 to"
    ):
        setup_environment.check_python((3, 9), "/usr/bin/python3.9")
    with pytest.raises(InstallError, match=r"3\.15"):
        setup_environment.check_python((3, 15), "python")
    for minor in range(10, 15):
        setup_environment.check_python((3, minor), "python")
    monkeypatch.setattr(setup_environment, "OLDEST", (3, 99))
    monkeypatch.setattr(setup_environment, "NEWEST", (3, 99))
    with pytest.raises(InstallError, match=r"3\.99"):
        Recorded(root, chosen_python=True).run()
    assert (root / ".venv" / "bin" / "python").exists()


def test_too_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_environment, "NEEDED_BYTES", 10**18)
    with pytest.raises(
        InstallError, match=r"GB free, and the environment and the downloads need 1000000000 GB"
    ):
        Recorded(tmp_path).run()
    assert not (tmp_path / ".venv").exists()


def test_hash_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("1")
    first = hash_of(tmp_path, ["d", "missing"], "word")
    assert first == hash_of(tmp_path, ["d", "missing"], "word")
    others = {hash_of(tmp_path, ["d"], "word"), hash_of(tmp_path, ["d", "missing"], "other")}
    (tmp_path / "d" / "x").write_text("2")
    others.add(hash_of(tmp_path, ["d", "missing"], "word"))
    (tmp_path / "d" / "x").rename(tmp_path / "d" / "y")
    others.add(hash_of(tmp_path, ["d", "missing"], "word"))
    (tmp_path / "missing").write_text("")
    others.add(hash_of(tmp_path, ["d", "missing"], "word"))
    assert len(others) == 5 and first not in others


def test_real_stages_follow_what_determines_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("constraints.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "csrc").mkdir()

    def inputs() -> dict[str, str]:
        return {stage.name: stage.inputs for stage in Environment(tmp_path).stages()}

    before = inputs()
    assert list(before) == ["tools", "torch", "detectron2", "project", "check"]
    for name, changed in [
        ("csrc/a.cpp", {"project"}),
        ("pyproject.toml", {"project"}),
        ("setup.py", {"project"}),
        ("projects/CCNet/tools/install_detectron2.py", {"detectron2"}),
        ("constraints.txt", set(before)),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("new " + name)
        after = inputs()
        assert {stage for stage in after if after[stage] != before[stage]} == changed
        before = after
    monkeypatch.setattr(setup_environment, "TORCH", ("torch==9",))
    assert {stage for stage, hashed in inputs().items() if hashed != before[stage]} == {"torch"}

    for name in ("DETECTRON2", *setup_environment.BUILD_VARIABLES):
        monkeypatch.setenv(name, "")  # as make exports what is not set
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setitem(setup_environment.BUILD_PROGRAMS, "nvcc", ("nvcc", str(tmp_path / "cuda/nvcc")))
    assert not any(stage.wishes for stage in Environment(tmp_path).stages())
    monkeypatch.setenv("DETECTRON2", " git+file:///somewhere ")
    monkeypatch.setenv("FORCE_CUDA", "1")
    wishes = {stage.name: stage.wishes for stage in Environment(tmp_path).stages()}
    assert wishes["detectron2"] == {"DETECTRON2": "git+file:///somewhere"}
    assert wishes["project"] == {"FORCE_CUDA": "1"}
    for program in ("programs/clang++", "cuda/nvcc"):
        (tmp_path / program).parent.mkdir(exist_ok=True)
        (tmp_path / program).touch(mode=0o755)
    wishes = {stage.name: stage.wishes for stage in Environment(tmp_path).stages()}
    assert wishes["project"] == {"FORCE_CUDA": "1", "C++ compiler": "found", "nvcc": "found"}


def test_what_the_real_stages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is done by the environment's own Python, which notes here what it is asked for."""
    environment = Environment(tmp_path)
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text(f'#!/bin/sh\necho "$TMPDIR $HOME $PWD $*" >>"{tmp_path}/asked"\n')
    environment.python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    for stage in environment.stages():
        stage.run()
    ours, theirs = f"{environment.temporary} /home/me {tmp_path} ", "/var/tmp /home/me "
    install = f"{ours}-m pip install --constraint {tmp_path}/constraints.txt "
    script = f"{tmp_path}/projects/CCNet/tools/install_detectron2.py"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"{install}pip setuptools wheel ninja",
        f"{install}torch torchvision",
        f"{ours}{script} --constraint {tmp_path}/constraints.txt --log {environment.log}",
        f"{install}--verbose --no-build-isolation --editable {tmp_path}[dev,headless]",
        f"{theirs}{tmp_path} -m pip check",
        # Elsewhere than where ccnet_d2's sources would be found whether it is installed or not.
        f"{theirs}{environment.venv} -W ignore -c {setup_environment.CHECK}",
    ]
    assert capsys.readouterr().out.endswith(
        f"compiled operator: not built, PyTorch's are used ({environment.log} says why)\n"
    )
    (tmp_path / "ccnet_d2/ops").mkdir(parents=True)
    for device in ("cuda", "cpu"):
        (tmp_path / f"ccnet_d2/ops/_C_{device}.so").touch()
    environment.install_project()
    assert capsys.readouterr().out.endswith("compiled operator: built for cpu and cuda\n")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (None, 0, ""),
        (InstallError("There is no torch."), 1, "set-up: There is no torch.\n"),
        (OSError(28, "No space left on device", "/disk"), 1, "set-up: /disk: No space left on device.\n"),
        (OSError("the disk is gone"), 1, "set-up: the system: the disk is gone.\n"),
        (
            KeyboardInterrupt(),
            130,
            "set-up: interrupted; run the command again, it goes on where it stopped.\n",
        ),
    ],
)
def test_how_the_script_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    status: int,
    words: str,
) -> None:
    (tmp_path / "constraints.txt").touch()
    made = []

    class Ending:
        def __init__(self, **keywords: bool) -> None:
            made.append(keywords)

        def run(self) -> None:
            with (tmp_path / "constraints.txt").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if error is not None:
                raise error

    monkeypatch.setattr(setup_environment, "ROOT", tmp_path)
    monkeypatch.setattr(setup_environment, "Environment", Ending)
    assert setup_environment.main(["--chosen-python"]) == status
    assert capsys.readouterr().err == words and made == [{"chosen_python": True}]


@pytest.mark.parametrize("name", ["install_detectron2.py", "detectron2_wheel.py"])
def test_detectron2_is_installed_again_where_its_making_changes(name: str, tmp_path: Path) -> None:
    tools = tmp_path / "projects" / "CCNet" / "tools"
    tools.mkdir(parents=True)
    before = {stage.name: stage.inputs for stage in Environment(tmp_path).stages()}
    (tools / name).write_text("new")
    after = {stage.name: stage.inputs for stage in Environment(tmp_path).stages()}
    assert {stage for stage in before if before[stage] != after[stage]} == {"detectron2"}


def test_stamp_holds_inputs_and_wishes(root: Path) -> None:
    environment = Recorded(root)
    stage = environment.stages()[0]
    assert json.loads(environment.stamp(stage).read_text()) == {"inputs": stage.inputs, "wishes": {}}


def test_two_set_ups_take_turns(tmp_path: Path) -> None:
    """The script waits for the lock that another one holds, and says so."""
    tools = tmp_path / "projects" / "CCNet" / "tools"
    tools.mkdir(parents=True)
    for name in ("setup_environment.py", "pip_runner.py", "pip_wheel.py", "package_index.py"):
        shutil.copy(ROOT / "projects" / "CCNet" / "tools" / name, tools)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / ".venv").mkdir()  # not ours, so that the script ends as soon as it has the lock
    with (tmp_path / "constraints.txt").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, str(tools / "setup_environment.py")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Waiting for another set-up")
        assert process.poll() is None
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith(f"set-up: {tmp_path / '.venv'} exists, was not made by this set-up")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("python", "message"),
    [("/nonexistent/python", "there is no /nonexistent/python: name an existing Python 3.10 to 3.14")],
)
def test_make_with_a_python_that_does_not_exist(python: str, message: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    result = subprocess.run(
        ["make", "-C", str(ROOT), "setup", f"PYTHON={python}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode != 0
    assert result.stderr.startswith(f"set-up: {message}")


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="pip refuses --user in virtual environments")
def test_pip_told_to_install_for_the_user_installs_into_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_USER", "1")  # as the modules of some clusters do
    (tmp_path / "constraints.txt").touch()
    environment = Environment(tmp_path)
    environment.python = Path(sys.executable)
    environment.temporary.mkdir(parents=True)
    environment.pip_install(["--dry-run", "--no-index", "pip"], "Installing what is there")
    assert "already satisfied" in environment.log.read_text()
