"""Make a pure-Python wheel of Detectron2 0.5 from its source archive on PyPI.

Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from pip_runner import InstallError

SDIST = "detectron2_cdo-0.5.tar.gz"
SDIST_PROJECT = "detectron2-cdo"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
# The local part says where this build comes from; detectron2.__version__ stays "0.5".
WHEEL_VERSION = "0.5+cdo"

# The archive holds 0.5 MB and unpacks to about 3 MB; anything far beyond is not what it claims to be.
MAX_MEMBERS = 5_000
MAX_UNPACKED_BYTES = 100 * 2**20


class Pip(Protocol):
    """Runs pip, see :func:`pip_runner.run_pip`."""

    def __call__(self, arguments: Sequence[str | os.PathLike[str]], *, what: str) -> str: ...


class Edit(NamedTuple):
    """A replacement in one file that must match exactly ``times`` times."""

    pattern: str
    replacement: str
    times: int


# numpy 1.24 removed the aliases of the built-in types.
_NUMPY_ALIAS = r"\bnp\.(bool|int|float|object|str)\b"

EDITS: dict[str, tuple[Edit, ...]] = {
    "detectron2/data/build.py": (Edit(_NUMPY_ALIAS, r"\1", 2),),
    "detectron2/data/datasets/pascal_voc.py": (Edit(_NUMPY_ALIAS, r"\1", 1),),
    "detectron2/evaluation/pascal_voc_evaluation.py": (Edit(_NUMPY_ALIAS, r"\1", 2),),
    "detectron2/evaluation/sem_seg_evaluation.py": (Edit(_NUMPY_ALIAS, r"\1", 7),),
    "detectron2/structures/masks.py": (Edit(_NUMPY_ALIAS, r"\1", 2),),
    "detectron2/utils/video_visualizer.py": (Edit(_NUMPY_ALIAS, r"\1", 1),),
    "detectron2/utils/visualizer.py": (Edit(_NUMPY_ALIAS, r"\1", 3),),
    # Pillow 10 removed LINEAR, an alias of BILINEAR.
    "detectron2/data/transforms/transform.py": (Edit(r"\bImage\.LINEAR\b", "Image.BILINEAR", 1),),
    # setuptools 82 removed pkg_resources.
    "detectron2/model_zoo/model_zoo.py": (
        Edit(r"(?m)^import os\nfrom typing import Optional\nimport pkg_resources$",
             "import importlib.resources\nimport os\nfrom typing import Optional", 1),
        Edit(r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", '
             r'os\.path\.join\("configs", config_path\)\s*\)',
             'str(importlib.resources.files("detectron2.model_zoo").joinpath("configs", config_path))', 1),
    ),
    # The fast implementation lives in detectron2._C; upstream falls back the same way when it is not built.
    "detectron2/evaluation/coco_evaluation.py": (
        Edit(r"(?m)^( +)self\._use_fast_impl = use_fast_impl$",
             r"\1if use_fast_impl:\n"
             r'\1    self._logger.info("Fast COCO eval is not built. Falling back to official COCO eval.")\n'
             r"\1self._use_fast_impl = False", 1),
    ),
}  # fmt: skip

MISSING_EXTENSION = '''\
"""Stands in for the C++ extension, which this pure-Python build of Detectron2 does not have."""


def get_compiler_version():
    return "none (pure-Python build without detectron2._C)"


def get_cuda_version():
    return "none (pure-Python build without detectron2._C)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):  # Python's own questions (copy, inspect, ...) expect an AttributeError
        raise AttributeError(name)
    raise ImportError(
        f"detectron2._C.{name} is not available: this is a pure-Python build of Detectron2 0.5. Deformable "
        "convolution and rotated boxes need Detectron2 built from its git repository."
    )
'''

# Upstream's requirements without black (pinned to a version that no longer installs), future (for caffe2) and
# dataclasses (for Python 3.6).
WHEEL_PROJECT = f'''\
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{WHEEL_VERSION}"
description = "Detectron2 0.5, pure-Python part, made from the archive {SDIST}"
authors = [{{name = "FAIR"}}]
license = {{text = "Apache-2.0"}}
requires-python = ">=3.9"
dependencies = [
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.6",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "pydot",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
]

[project.urls]
Homepage = "https://github.com/facebookresearch/detectron2"

[tool.setuptools.packages.find]
include = ["detectron2*"]
namespaces = false

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.py", "configs/**/*.yaml"]
'''

# Small projects that upstream installs inside the package; moved there so that one directory holds it all.
PROJECTS = {
    "point_rend": "projects/PointRend/point_rend",
    "deeplab": "projects/DeepLab/deeplab",
    "panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}


def verify_sha256(archive: Path, expected: str) -> None:
    """Raise InstallError unless the file has the expected sha256."""
    try:
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"{archive} cannot be read: {error.strerror}.") from error
    if found != expected:
        raise InstallError(
            f"{archive} has sha256 {found} instead of {expected}: it is damaged or not the archive it should"
            " be; delete it and download it again."
        )


def extract_archive(archive: Path, destination: Path) -> Path:
    """Unpack a source archive, only plain files and directories below one top directory.

    Args:
        archive: a .tar.gz file.
        destination: an existing directory.

    Returns:
        The archive's top directory below ``destination``.

    Raises:
        InstallError: an entry is a link or a device, would land outside, or the whole is far too large.
    """
    tops: set[str] = set()
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for number, member in enumerate(tar):
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in member.name:
                    raise InstallError(f"{archive} is refused: its entry {member.name!r} leads outside.")
                if not (member.isfile() or member.isdir()):
                    raise InstallError(
                        f"{archive} is refused: its entry {member.name!r} is not a plain file."
                    )
                total += member.size
                if number >= MAX_MEMBERS or total > MAX_UNPACKED_BYTES:
                    raise InstallError(f"{archive} is refused: it unpacks to far more than Detectron2 holds.")
                tops.add(path.parts[0])
                target = destination.joinpath(*path.parts)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # isfile() above
                with content, target.open("xb") as out:
                    shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InstallError(f"{archive} cannot be unpacked: {error}.") from error
    if len(tops) != 1:
        raise InstallError(f"{archive} is refused: it should hold one top directory and holds {len(tops)}.")
    return destination / tops.pop()


def apply_edits(source: Path, edits: dict[str, tuple[Edit, ...]] | None = None) -> None:
    """Apply :data:`EDITS` to the unpacked source; every edit must match as often as it says.

    Raises:
        InstallError: a file is missing, or an edit matched another number of times. No file is changed then.
    """
    results: dict[Path, str] = {}
    for name, file_edits in (EDITS if edits is None else edits).items():
        path = source / name
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InstallError(f"{name} is missing from the archive: {error.strerror}.") from error
        for edit in file_edits:
            text, count = re.subn(edit.pattern, edit.replacement, text)
            if count != edit.times:
                raise InstallError(
                    f"The edit of {name} should replace /{edit.pattern}/ {edit.times} time(s) and found"
                    f" {count}: this is not the source that the edits were written for."
                )
        results[path] = text
    for path, text in results.items():
        path.write_text(text, encoding="utf-8")


def prepare_source(source: Path) -> None:
    """Turn the unpacked archive into a pure-Python project that any setuptools can build."""
    apply_edits(source)
    (source / "detectron2" / "_C.py").write_text(MISSING_EXTENSION, encoding="utf-8")
    for name, directory in PROJECTS.items():
        shutil.move(source / directory, source / "detectron2" / "projects" / name)
    leftovers = [
        path.relative_to(source)
        for path in sorted((source / "detectron2").rglob("*.py"))
        if re.search(_NUMPY_ALIAS + r"|\bpkg_resources\b|\bImage\.LINEAR\b", path.read_text(encoding="utf-8"))
    ]
    if leftovers:
        raise InstallError(f"Removed names of numpy, Pillow or setuptools are left in {leftovers[0]}.")
    (source / "setup.py").unlink()
    (source / "setup.cfg").unlink()
    (source / "pyproject.toml").write_text(WHEEL_PROJECT, encoding="utf-8")


def build_wheel(archive: Path, directory: Path, work: Path, pip: Pip, sha256: str = SDIST_SHA256) -> Path:
    """Build the pure-Python wheel of 0.5.

    Args:
        archive: the source archive.
        directory: where the wheel goes, made if need be.
        work: an empty directory to work in.
        pip: runs pip.
        sha256: what the archive must hash to.

    Returns:
        The wheel, whole.
    """
    verify_sha256(archive, sha256)
    unpacked = work / "source"
    unpacked.mkdir()
    source = extract_archive(archive, unpacked)
    prepare_source(source)
    built = work / "wheel"
    pip(
        ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source],
        what="Building the pure-Python wheel of Detectron2",
    )
    (wheel,) = built.glob("detectron2-*.whl")
    directory.mkdir(parents=True, exist_ok=True)
    # Moved under its final name only when complete.
    partial = directory / (wheel.name + ".partial")
    shutil.copyfile(wheel, partial)
    return partial.replace(directory / wheel.name)
