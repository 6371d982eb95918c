"""The making of Detectron2 0.5 from its source archive: what is refused, and what the wheel holds."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import types
import venv
import zipfile
from pathlib import Path

import pytest

import detectron2_wheel
import install_detectron2
from detectron2_wheel import Edit
from pip_runner import InstallError, run_pip

SCRIPT = Path(install_detectron2.__file__)
needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="builds with the setuptools of this environment"
)


def installed_detectron2() -> str | None:
    """Version of the distribution, with its local part."""
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None


def add_file(tar: tarfile.TarFile, name: str, content: bytes = b"x") -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def make_source(root: Path) -> Path:
    """A tree with the archive's layout, whose files hold what the edits look for."""
    files = {
        "setup.py": "raise RuntimeError('must not run')\n",
        "setup.cfg": "[isort]\nline_length = 100\n",
        "LICENSE": "Apache License\n",
        "README.md": "Detectron2\n",
        "detectron2/__init__.py": '__version__ = "0.5"\n',
        "detectron2/data/__init__.py": "",
        "detectron2/data/build.py": "import numpy as np\na = np.zeros(2, dtype=np.int)\nb = a.astype(np.int)\n",
        "detectron2/data/datasets/__init__.py": "",
        "detectron2/data/datasets/pascal_voc.py": "import numpy as np\na = np.array(['1'], dtype=np.str)\n",
        "detectron2/data/transforms/__init__.py": "",
        "detectron2/data/transforms/transform.py": "from PIL import Image\ninterp = Image.LINEAR\n",
        "detectron2/evaluation/__init__.py": "",
        "detectron2/evaluation/pascal_voc_evaluation.py": "import numpy as np\n" + "a = np.bool\n" * 2,
        "detectron2/evaluation/sem_seg_evaluation.py": "import numpy as np\n"
        + "a = np.int\n" * 2
        + "b = np.float\n" * 5
        + "c = np.float32, np.int64, np.bool_\n",
        "detectron2/evaluation/coco_evaluation.py": (
            "class E:\n    def __init__(self, use_fast_impl=True):\n        self._logger = self\n"
            "        self._use_fast_impl = use_fast_impl\n\n    def info(self, text):\n        self.said = text\n"
        ),
        "detectron2/structures/__init__.py": "",
        "detectron2/structures/masks.py": "import numpy as np\na = np.bool, np.bool\n",
        "detectron2/utils/__init__.py": "",
        "detectron2/utils/visualizer.py": "import numpy as np\n" + "a = np.bool\n" * 3,
        "detectron2/utils/video_visualizer.py": "import numpy as np\na = np.bool\n",
        "detectron2/projects/__init__.py": "",
        "detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
        "detectron2/model_zoo/model_zoo.py": (
            "import os\nfrom typing import Optional\nimport pkg_resources\n\n\n"
            "def get_config_file(config_path):\n"
            "    cfg_file = pkg_resources.resource_filename(\n"
            '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
            "    )\n    return cfg_file\n"
        ),
        "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
        "detectron2/model_zoo/configs/common/models/retina.py": "model = 1\n",
        "projects/PointRend/point_rend/__init__.py": "name = 'point_rend'\n",
        "projects/DeepLab/deeplab/__init__.py": "name = 'deeplab'\n",
        "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "name = 'panoptic_deeplab'\n",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@needs_setuptools
def test_wheel_from_an_archive(tmp_path: Path) -> None:
    make_source(tmp_path / "detectron2_cdo-0.5")
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "detectron2_cdo-0.5", "detectron2_cdo-0.5")
    work = tmp_path / "work"
    work.mkdir()
    wheel = detectron2_wheel.build_wheel(
        archive,
        tmp_path / "dist",
        work,
        functools.partial(run_pip, extra_env={"PIP_NO_INDEX": "1"}),
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
    )
    assert wheel.name == "detectron2-0.5+cdo-py3-none-any.whl"
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]

    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        metadata = content.read("detectron2-0.5+cdo.dist-info/METADATA").decode()
    assert {
        "detectron2/_C.py",
        "detectron2/model_zoo/configs/Base.yaml",
        "detectron2/model_zoo/configs/common/models/retina.py",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2/projects/deeplab/__init__.py",
        "detectron2/projects/panoptic_deeplab/__init__.py",
    } <= names
    assert not [name for name in names if not name.startswith(("detectron2/", "detectron2-0.5"))]
    # Those of upstream's setup.py, but for black, future and dataclasses.
    required = set(re.findall(r"(?m)^Requires-Dist: ([\w-]+)", metadata))
    assert required == set(
        "Pillow matplotlib pycocotools termcolor yacs tabulate cloudpickle tqdm tensorboard fvcore iopath pydot "
        "omegaconf hydra-core".split()
    )

    # What is in the wheel runs where numpy, Pillow and setuptools have dropped the old names.
    program = (
        "from detectron2.model_zoo import get_config_file;"
        "import detectron2.data.build, detectron2.data.datasets.pascal_voc, detectron2.data.transforms.transform;"
        "import detectron2.evaluation.sem_seg_evaluation, detectron2.utils.visualizer;"
        "from detectron2.evaluation.coco_evaluation import E;"
        "assert E()._use_fast_impl is False and 'not built' in E().said;"
        "print(open(get_config_file('Base.yaml')).read())"
    )
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as content:
        content.extractall(target)
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "VERSION: 2"


@pytest.mark.parametrize("name", ["detectron2/utils/visualizer.py", "detectron2/model_zoo/model_zoo.py"])
def test_edit_that_does_not_match_changes_nothing(tmp_path: Path, name: str) -> None:
    source = make_source(tmp_path)
    (source / name).write_text("import os\n", encoding="utf-8")
    before = snapshot(source)
    with pytest.raises(InstallError, match=rf"edit of {name}.*found 0"):
        detectron2_wheel.apply_edits(source)
    assert snapshot(source) == before


def test_edit_that_matches_too_often(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("old old", encoding="utf-8")
    with pytest.raises(InstallError, match=r"1 time.*found 2"):
        detectron2_wheel.apply_edits(tmp_path, {"a.py": (Edit("old", "new", 1),)})
    detectron2_wheel.apply_edits(tmp_path, {"a.py": (Edit("old", "new", 2),)})
    assert (tmp_path / "a.py").read_text() == "new new"


def test_missing_file_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    (source / "detectron2/data/build.py").unlink()
    with pytest.raises(InstallError, match=r"detectron2/data/build\.py is missing"):
        detectron2_wheel.apply_edits(source)


@pytest.mark.parametrize("text", ["a = np.object", "import pkg_resources", "a = Image.LINEAR"])
def test_leftover_names_are_refused(tmp_path: Path, text: str) -> None:
    source = make_source(tmp_path)
    (source / "detectron2/data/more.py").write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(InstallError, match=r"left in detectron2/data/more\.py"):
        detectron2_wheel.prepare_source(source)


@pytest.mark.parametrize(
    "name", ["../outside", "top/../../outside", "{tmp_path}/outside", "top\\..\\outside", "./"]
)
def test_archive_that_leads_outside(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add_file(tar, name.format(tmp_path=tmp_path))
    destination = tmp_path / "in" / "side"
    destination.mkdir(parents=True)
    with pytest.raises(InstallError, match="leads outside"):
        detectron2_wheel.extract_archive(archive, destination)
    assert list((tmp_path / "in").iterdir()) == [destination] and not list(destination.iterdir())
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_archive_with_what_is_no_file(tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "bad.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("top/link")
        info.type = kind
        info.linkname = "/etc/passwd"
        tar.addfile(info)
    destination = tmp_path / "inside"
    destination.mkdir()
    with pytest.raises(InstallError, match="not a plain file"):
        detectron2_wheel.extract_archive(archive, destination)
    assert not list(destination.rglob("*"))


def test_archive_that_unpacks_to_too_much(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.tar.gz"
    with gzip.open(archive, "wb") as out:
        # Only a header that promises much: nothing of it may be read, let alone written.
        info = tarfile.TarInfo("top/zeros")
        info.size = 8 * 2**30
        out.write(info.tobuf())
    destination = tmp_path / "inside"
    destination.mkdir()
    with pytest.raises(InstallError, match="far more"):
        detectron2_wheel.extract_archive(archive, destination)
    assert not [p for p in destination.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one/a", "two/a"], "one top directory and holds 2"),
        ([], "one top directory and holds 0"),
        (["top/a", "top/a"], r"cannot be unpacked: .*File exists"),
        (["top/a", "top/b", "top/c"], ""),
        (["top/a", "top/b", "top/c", "top/d"], "far more than Detectron2 holds"),  # files
        (["top/a", "top/" + "b" * 20], "far more than Detectron2 holds"),  # bytes
    ],
)
def test_archives_of_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    monkeypatch.setattr(detectron2_wheel, "MAX_MEMBERS", 3)
    monkeypatch.setattr(detectron2_wheel, "MAX_UNPACKED_BYTES", 25)
    archive = tmp_path / "small.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            add_file(tar, name, name.encode())
    destination = tmp_path / "inside"
    destination.mkdir()
    if message:
        with pytest.raises(InstallError, match=message):
            detectron2_wheel.extract_archive(archive, destination)
    else:
        assert detectron2_wheel.extract_archive(archive, destination) == destination / "top"
        assert snapshot(destination) == {name: name.encode() for name in names}


def test_archive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"none\.tar\.gz cannot be read: No such file or directory\.$"):
        detectron2_wheel.verify_sha256(tmp_path / "none.tar.gz", "")


def test_truncated_archive(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        add_file(tar, "top/a", os.urandom(20_000))
    archive = tmp_path / "cut.tar.gz"
    archive.write_bytes(whole.read_bytes()[:10_000])
    destination = tmp_path / "inside"
    destination.mkdir()
    with pytest.raises(InstallError, match=r"cut\.tar\.gz cannot be unpacked"):
        detectron2_wheel.extract_archive(archive, destination)


def run_script(*arguments: str, python: str = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("DETECTRON2", "PYTHONPATH")}
    return subprocess.run(
        [python, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**environment, "PIP_NO_INDEX": "1", **env},
    )


def test_wrong_hash_is_one_sentence_and_builds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    archive = tmp_path / "other.tar.gz"
    archive.write_bytes(b"something else")
    result = run_script("--sdist", str(archive), "--wheel-dir", str(tmp_path / "dist"))
    assert result.returncode == 1
    assert result.stderr.startswith(f"install_detectron2: {archive} has sha256 ")
    assert detectron2_wheel.SDIST_SHA256 in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "dist").exists()


def test_requirement_that_does_not_exist() -> None:
    result = run_script(DETECTRON2="/nonexistent/detectron2")
    assert result.returncode == 1
    assert (
        result.stderr == "install_detectron2: There is no /nonexistent/detectron2, which DETECTRON2 names.\n"
    )


def test_constraints_that_do_not_exist() -> None:
    result = run_script("--constraint", "/nonexistent/constraints.txt")
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "install_detectron2: The constraints file /nonexistent/constraints.txt does not exist."
    )


@pytest.mark.skipif(installed_detectron2() is None, reason="Detectron2 is not installed")
def test_installed_detectron2_is_kept() -> None:
    result = run_script()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Detectron2 ") and result.stdout.endswith(" is kept.\n")


@needs_setuptools
def test_another_requirement_replaces_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = tmp_path / "fork"
    (source / "detectron2").mkdir(parents=True)
    # As upstream's, it imports torch to build, so that only a build without isolation can work.
    (source / "setup.py").write_text(
        "import torch\nfrom setuptools import setup\n"
        "setup(name='detectron2', version='99.0', packages=['detectron2'])\n"
    )
    (source / "detectron2" / "__init__.py").write_text("__version__ = '99.0'\n")
    (source / "detectron2" / "model_zoo.py").write_text("")
    # An environment of its own that sees this one's packages, so that this one stays as it is.
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site_packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site_packages / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = str(tmp_path / "env" / "bin" / "python")

    result = run_script("--requirement", str(source), python=python)
    assert result.returncode == 0, result.stderr + result.stdout
    assert f"Detectron2 99.0 at {site_packages / 'detectron2'} is installed.\n" in result.stdout
    assert "99.0" in run_script(python=python).stdout
    assert installed_detectron2() != "99.0"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What the script asks pip for, which does nothing; a wheel is named after where it is made and of what."""
    commands: list[list[str]] = []

    def pip(arguments: list[str | Path], **keywords: object) -> str:
        assert keywords["log"] == tmp_path / "log" and keywords["extra_env"] == {"PYTHONPATH": "/tools"}
        commands.append([str(argument) for argument in arguments])
        return ""

    monkeypatch.setattr(install_detectron2, "run_pip", pip)
    monkeypatch.setattr(
        install_detectron2, "provide_setuptools", lambda folder, pip: {"PYTHONPATH": "/tools"}
    )
    monkeypatch.setattr(
        install_detectron2, "fetch_file", lambda project, name, sha256, work: Path(f"got-{project}")
    )
    monkeypatch.setattr(
        install_detectron2,
        "build_wheel",
        lambda archive, directory, work, pip: Path(
            f"{archive}.{directory.relative_to(directory.parent)}.whl"
        ),
    )
    monkeypatch.delenv("DETECTRON2", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").touch()
    return commands


@pytest.mark.parametrize(
    ("present", "arguments", "expected"),
    [
        (False, "", ["install", "got-detectron2-cdo.dist.whl"]),
        (True, "", None),
        (True, "--constraint c.txt", None),
        (True, "--force", ["install", "--force-reinstall", "--no-deps", "got-detectron2-cdo.dist.whl"]),
        (False, "--constraint c.txt", ["install", "--constraint", "/c.txt", "got-detectron2-cdo.dist.whl"]),
        (False, "--sdist mine", ["install", "mine.dist.whl"]),
        (True, "--requirement git+x", ["install", "--no-build-isolation", "git+x"]),
        (False, "--requirement git+x --constraint c.txt",
         ["install", "--no-build-isolation", "--constraint", "/c.txt", "git+x"]),
        (True, "--requirement git+x --wheel-dir here --sdist mine", None),
    ],
)  # fmt: skip
def test_what_pip_is_asked_for(
    asked: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    present: bool,
    arguments: str,
    expected: list[str] | None,
) -> None:
    pytest.importorskip("torch")
    imported = []

    def import_detectron2(module: str = "detectron2") -> tuple[str | None, str]:
        imported.append(module)
        return (
            (f"0.5 at {len(imported)}", "") if present or len(imported) > 1 else (None, "ModuleNotFoundError")
        )

    monkeypatch.setattr(install_detectron2, "import_detectron2", import_detectron2)
    assert install_detectron2.main([*arguments.split(), "--log", str(tmp_path / "log")]) == 0
    said = capsys.readouterr().out
    if expected is None:
        assert asked == []
        assert said == (
            "Detectron2 wheel: mine.here.whl\n" if "here" in arguments else "Detectron2 0.5 at 1 is kept.\n"
        )
    else:
        assert asked == [[str(tmp_path / word[1:]) if word == "/c.txt" else word for word in expected]]
        assert said == "Detectron2 0.5 at 2 is installed.\n"
        # Of a Detectron2 that needs pkg_resources, this is what fails.
        assert imported == ["detectron2", "detectron2.model_zoo"]


def test_requirement_of_the_environment_variable(
    asked: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("DETECTRON2", " ./fork ")
    (tmp_path / "fork").mkdir()
    error = "ModuleNotFoundError: No module named 'pkg_resources'"
    monkeypatch.setattr(install_detectron2, "import_detectron2", lambda module="": (None, error))
    assert install_detectron2.main(["--log", str(tmp_path / "log")]) == 1
    assert asked == [["install", "--no-build-isolation", str(tmp_path / "fork")]]
    assert capsys.readouterr().err == (
        f"install_detectron2: Detectron2 was installed but cannot be imported ({error}): install 'setuptools<82', the "
        "last to have it.\n"
    )


def test_what_is_imported_and_what_is_said_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the name beside the user is no Detectron2; one on the path is."""
    for folder in (tmp_path / "detectron2", tmp_path / "path" / "detectron2"):
        folder.mkdir(parents=True)
    (tmp_path / "detectron2" / "__init__.py").write_text("__version__ = '0.0'\n")
    (tmp_path / "path" / "detectron2" / "__init__.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "path" / "detectron2" / "half.py").write_text(
        "import warnings\nwarnings.warn('x')\nimport no_such\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    assert install_detectron2.import_detectron2() == (f"9.9 at {tmp_path / 'path' / 'detectron2'}", "")
    assert install_detectron2.import_detectron2("detectron2.half") == (
        None,
        "ModuleNotFoundError: No module named 'no_such'",
    )


def test_setuptools_and_torch_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    environment = install_detectron2.provide_setuptools(
        tmp_path / "tools", lambda arguments, *, what: asked.append(arguments) or ""
    )
    assert asked == [["install", "--target", tmp_path / "tools", "setuptools>=64,<82", "wheel"]]
    assert environment == {"PYTHONPATH": f"{tmp_path / 'tools'}{os.pathsep}/mine"}
    monkeypatch.setattr(install_detectron2, "import_detectron2", lambda: (None, ""))
    with pytest.raises(InstallError, match="install torch and torchvision first"):
        install_detectron2.install(install_detectron2.parse_arguments(["--requirement", "git+x"]))


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(30, "Read-only file system", "/env"), 1, "/env: Read-only file system."),
        (KeyboardInterrupt(), 130, "interrupted; run it again."),
    ],
)
def test_how_the_script_ends(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    words: str,
) -> None:
    def end(arguments: object) -> None:
        raise error

    monkeypatch.setattr(install_detectron2, "install", end)
    assert install_detectron2.main([]) == status
    assert capsys.readouterr().err == f"install_detectron2: {words}\n"


def test_stand_in_for_the_extension() -> None:
    module = types.ModuleType("detectron2._C")
    exec(detectron2_wheel.MISSING_EXTENSION, module.__dict__)
    with pytest.raises(ImportError, match=r"detectron2\._C\.box_iou_rotated is not available"):
        _ = module.box_iou_rotated
    assert not hasattr(module, "__wrapped__")
    assert "none" in module.get_compiler_version() and "none" in module.get_cuda_version()
    assert module.has_cuda() is False


@pytest.mark.skipif(installed_detectron2() != detectron2_wheel.WHEEL_VERSION, reason="another Detectron2")
def test_coco_evaluation_of_the_installed_wheel(tmp_path: Path) -> None:
    """COCOEvaluator's default is the compiled implementation, which this build does not have."""
    import torch
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    annotations = {
        "info": {},
        "images": [{"id": 1, "height": 40, "width": 60, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 10], "area": 200, "iscrowd": 0}
        ],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    name = "test_install_detectron2_coco"
    DatasetCatalog.register(name, lambda: [])
    try:
        MetadataCatalog.get(name).set(
            json_file=str(tmp_path / "annotations.json"), thing_dataset_id_to_contiguous_id={1: 0}
        )
        evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False)
        evaluator.reset()
        found = Instances((40, 60))
        found.pred_boxes = Boxes(torch.tensor([[5.0, 6.0, 25.0, 16.0]]))
        found.scores = torch.tensor([0.9])
        found.pred_classes = torch.tensor([0])
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100.0)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
