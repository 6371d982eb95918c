"""Where a wheel of pip comes from, for an environment that Python could not give one.

Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from package_index import fetch_file

# Only fetched where the system has neither ensurepip nor a wheel of pip. The same version as in constraints.txt.
PIP_WHEEL = "pip-26.3-py3-none-any.whl"
PIP_WHEEL_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def get_pip_wheel(directory: Path) -> Path:
    """Return a wheel of pip: the system's, or the package index's.

    Args:
        directory: an empty directory to download to.

    Raises:
        InstallError: the package index cannot be reached, or serves another file.
    """
    return system_pip(directory) or fetch_file("pip", PIP_WHEEL, PIP_WHEEL_SHA256, directory)


def system_pip(directory: Path, root: Path = Path("/")) -> Path | None:
    """Return the wheel of pip that Debian and Ubuntu keep for making environments.

    It is in a package of its own, python3-pip-whl. If that is not installed, it is downloaded and unpacked, for
    which nobody needs to be root.

    Args:
        directory: an empty directory to download to.
        root: the file system it may be installed in.

    Returns:
        The wheel, None if there is no such package here.
    """
    place = Path("usr/share/python-wheels")
    unpacked = directory / "unpacked"
    if not any((root / place).glob("pip-*.whl")):
        commands = (
            ["apt-get", "download", "-qq", "python3-pip-whl"],
            ["sh", "-c", 'dpkg-deb -x python3-pip-whl_*.deb "$0"', str(unpacked)],
        )
        for command in commands:
            if shutil.which(command[0]) is None:
                return None
            if subprocess.run(command, cwd=directory, capture_output=True, check=False).returncode != 0:
                return None
    wheels = [wheel for base in (root, unpacked) for wheel in sorted((base / place).glob("pip-*.whl"))]
    return wheels[0] if wheels else None
