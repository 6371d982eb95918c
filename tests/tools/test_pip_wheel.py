"""Where the set-up gets a wheel of pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import pip_wheel


def test_installed_wheel_of_pip_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no command is needed for it
    wheels = tmp_path / "root" / "usr" / "share" / "python-wheels"
    wheels.mkdir(parents=True)
    (wheels / "pip-23.0.1-py3-none-any.whl").touch()
    assert pip_wheel.system_pip(tmp_path, tmp_path / "root") == wheels / "pip-23.0.1-py3-none-any.whl"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_wheel_of_pip_from_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real package, unpacked by the real dpkg-deb; only apt-get, which would use the network, is replaced."""
    tree = tmp_path / "tree"
    (tree / "usr" / "share" / "python-wheels").mkdir(parents=True)
    (tree / "usr" / "share" / "python-wheels" / "pip-24.0-py3-none-any.whl").write_text("wheel")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: python3-pip-whl\nVersion: 24.0\nArchitecture: all\nMaintainer: A <a@example.org>\n"
        "Description: pip\n"
    )
    package = tmp_path / "package.deb"
    build = ["dpkg-deb", "--build", str(tree), str(package)]
    subprocess.run(build, check=True, capture_output=True)
    (tmp_path / "bin").mkdir()
    apt_get = tmp_path / "bin" / "apt-get"
    apt_get.write_text(
        '#!/bin/sh\n[ "$*" = "download -qq python3-pip-whl" ] || exit 9\n'
        f"cp '{package}' python3-pip-whl_24.0_all.deb\n"
    )
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    directory = tmp_path / "directory"
    directory.mkdir()
    wheel = pip_wheel.system_pip(directory, tmp_path / "nothing")
    assert wheel and wheel.read_text() == "wheel" and wheel.is_relative_to(directory)
    assert (directory / "python3-pip-whl_24.0_all.deb").is_file()

    shutil.rmtree(tree / "usr")  # another distribution's package of the name
    subprocess.run(build, check=True, capture_output=True)
    (tmp_path / "empty").mkdir()
    assert pip_wheel.system_pip(tmp_path / "empty", tmp_path / "nothing") is None

    apt_get.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    other = tmp_path / "other"
    other.mkdir()
    assert pip_wheel.system_pip(other, tmp_path / "nothing") is None


def test_no_wheel_of_pip_where_there_is_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pip_wheel.system_pip(tmp_path, tmp_path / "nothing") is None


def test_wheel_of_pip_is_the_system_s_or_else_the_index_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(project: str, filename: str, sha256: str, directory: Path) -> Path:
        assert project == "pip" and len(sha256) == 64
        return directory / filename

    monkeypatch.setattr(pip_wheel, "fetch_file", fetch)
    for of_system in (tmp_path / "pip-1.whl", None):
        monkeypatch.setattr(pip_wheel, "system_pip", lambda directory, found=of_system: found)
        expected = of_system or tmp_path / pip_wheel.PIP_WHEEL
        assert pip_wheel.get_pip_wheel(tmp_path) == expected
