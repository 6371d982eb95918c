"""setup.py where parts are missing: the package always builds, says what is left out and why, or fails if told to."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH_IS_NEW_ENOUGH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"
RUN_SETUP = (
    "import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--build-lib', {lib!r}, '--build-temp', {temp!r}, "
    "*{options!r}]\n"
    "runpy.run_path('setup.py', run_name='__main__')\n"
)


@pytest.fixture
def build(tmp_path):
    """Runs setup.py on a copy of the sources with other environment variables."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    skipped = shutil.ignore_patterns("*.so", "*.not_built", "__pycache__", "emulation")
    for name in ("csrc", "ccnet_d2", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)

    def run(*options, before="", **variables):
        environment = {k: v for k, v in os.environ.items() if k not in ("CCNET_EXT", "CXX", "CXXFLAGS")}
        environment |= {"FORCE_CUDA": "0", **variables}
        lib, temp = (str(tmp_path / name) for name in ("out", "temp"))
        program = before + RUN_SETUP.format(lib=lib, temp=temp, options=list(options))
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, sorted(path.name for path in tmp_path.rglob("*.so"))

    return run


def test_switched_off(build):
    done, libraries = build(CCNET_EXT="0")
    assert done.returncode == 0, done.stderr
    assert libraries == [] and "CCNET_EXT=0 asks to leave it out" in done.stderr


def test_without_torch(build):
    done, libraries = build(before=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert libraries == []
    assert "for CPU is NOT built: torch cannot be imported" in done.stderr
    assert "--no-build-isolation" in done.stderr


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
def test_without_a_compiler(build, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done, libraries = build(PATH=str(empty))
    assert done.returncode == 0, done.stderr
    assert libraries == [] and "no C++ compiler was found" in done.stderr


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
def test_compiler_named_but_missing(build):
    done, libraries = build(CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert libraries == [] and "CXX names, /no/such/compiler, does not exist" in done.stderr


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compilation_that_fails(build):
    flags = "-include no_such_header.h"
    done, libraries = build(CXXFLAGS=flags)
    assert done.returncode == 0, done.stderr
    assert libraries == []
    assert "the compiler failed" in done.stderr and "no_such_header.h" in done.stderr
    done, libraries = build(CXXFLAGS=flags, CCNET_EXT="require")
    assert done.returncode != 0
    assert libraries == [] and "CCNET_EXT=require asks for it" in done.stderr


def test_requiring_what_cannot_be_built_is_an_error(build):
    done, libraries = build(before=WITHOUT_TORCH, CCNET_EXT="require")
    assert done.returncode != 0
    assert libraries == [] and "CCNET_EXT=require asks for it" in done.stderr


def test_unknown_wish_is_refused(build):
    done, _ = build(CCNET_EXT="maybe")
    assert done.returncode != 0
    assert "CCNET_EXT=maybe is unknown" in done.stderr


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
def test_the_reason_stays_beside_the_package(build, tmp_path):
    """pip shows nothing of what a build that succeeds says."""
    folders = (
        tmp_path / "ccnet_d2/ops",
        tmp_path / "out/ccnet_d2/ops",
    )  # sources, and what a wheel is made of

    def reasons(name):
        return [(folder / f"{name}.not_built").read_text() for folder in folders]

    build("--inplace", CXXFLAGS="-include no_such_header.h")
    assert all("the compiler failed" in text and "no_such_header.h" in text for text in reasons("_C_cpu"))
    assert reasons("_C_cuda") == ["FORCE_CUDA=0 asks to leave it out.\n"] * 2
    build("--inplace", CXX="/no/such/compiler")
    assert all(text.startswith("the C++ compiler that CXX names") for text in reasons("_C_cpu"))


def test_a_library_beside_the_sources(build, tmp_path):
    """It is of an install in place: only another one of those takes it away."""
    library = tmp_path / "ccnet_d2/ops/_C_cpu.so"
    library.write_bytes(b"of an earlier build")
    build(before=WITHOUT_TORCH)
    assert library.exists() and not library.with_suffix(".not_built").exists()
    build("--inplace", before=WITHOUT_TORCH)
    assert not library.exists()


def test_a_library_beside_the_sources_goes_where_none_is_wanted(build, tmp_path):
    """CCNET_EXT=0 in a tree that has one: the package would go on to load it."""
    library = tmp_path / "ccnet_d2/ops/_C_cpu.so"
    library.write_bytes(b"of an earlier build")
    done, libraries = build("--inplace", CCNET_EXT="0")
    assert done.returncode == 0, done.stderr
    assert libraries == []
    assert library.with_suffix(".not_built").read_text() == "CCNET_EXT=0 asks to leave it out.\n"


def test_a_wheel_is_for_one_platform_only_where_it_holds_a_library(build, tmp_path):
    compiler = tmp_path / "compiler"  # that takes no time
    compiler.write_text(OLD_COMPILER.format(python=sys.executable))
    compiler.chmod(0o755)
    # One after another in one tree, where what the build before left must not come into the wheel.
    for turn, built in enumerate([False, True, False] if TORCH_IS_NEW_ENOUGH else [False]):
        wish = {"CXX": str(compiler), "CCNET_EXT": "require"} if built else {"CCNET_EXT": "0"}
        done, _ = build("bdist_wheel", "--dist-dir", str(tmp_path / f"dist{turn}"), **wish)
        assert done.returncode == 0, done.stderr
        (wheel,) = (tmp_path / f"dist{turn}").iterdir()
        tags = wheel.stem.split("-")[2:]
        with zipfile.ZipFile(wheel) as content:
            names = content.namelist()
            (about,) = [content.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")]
        assert "ccnet_d2/ops/__init__.py" in names
        for suffix, there in (("so", built), ("not_built", not built)):
            assert (f"ccnet_d2/ops/_C_cpu.{suffix}" in names) == there
        assert tags[:2] == (["cp310", "abi3"] if built else ["py3", "none"]) and (tags[2] == "any") != built
        assert f"Root-Is-Purelib: {str(not built).lower()}\n" in about and f"Tag: {'-'.join(tags)}\n" in about


@pytest.mark.slow
@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_build_and_load(build, tmp_path):
    done, libraries = build(CCNET_EXT="require")
    assert done.returncode == 0, done.stderr
    assert libraries == ["_C_cpu.so"]
    assert "for CUDA is NOT built: FORCE_CUDA=0" in done.stderr
    assert [path.name for path in tmp_path.rglob("*.not_built")] == ["_C_cuda.not_built"]
    assert "is left out" not in done.stderr  # a compiler of the last years knows all instructions
    program = (
        "import sys, torch; torch.ops.load_library(sys.argv[1])\n"
        "x = torch.randn(1, 2, 1, 1); print(torch.equal(torch.ops.ccnet_d2.criss_cross_forward(x, x, x)[0], x))"
    )
    library = next((tmp_path / "out").rglob("*.so"))
    loaded = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    assert loaded.stdout.strip() == "True", loaded.stderr
    # A second build finds everything done.
    again, _ = build(CCNET_EXT="require")
    assert " -c " not in again.stdout, again.stdout


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("ccnet_d2_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architectures(setup_module):
    assert setup_module.architecture_flags(setup_module.architecture_list("8.0;9.0a+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(setup_module.NotBuilt, match="'Hopper', which is no architecture"):
        setup_module.architecture_list("Hopper")


def test_architectures_that_the_kernels_do_not_run_on(setup_module, capfd):
    """Images with PyTorch name every architecture that PyTorch knows."""
    assert setup_module.architecture_list("7.0 7.5 8.0 10.0 12.0+PTX") == ["8.0", "10.0", "12.0+PTX"]
    assert "7.0, 7.5 are left out" in capfd.readouterr().err
    with pytest.raises(setup_module.NotBuilt, match="nothing but architectures older than 8"):
        setup_module.architecture_list("6.1;7.5+PTX")
    assert setup_module.architecture_list("8.0;9.0+PTX") and capfd.readouterr().err == ""


@pytest.mark.parametrize("jobs", ["abc", "-1", "1.5"])
def test_jobs_that_are_no_number(setup_module, monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(setup_module.NotBuilt, match=f"MAX_JOBS={jobs} is no number"):
        setup_module.job_count()


def test_jobs(setup_module, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_module.job_count() == 3
    for unset in ("", "0"):
        monkeypatch.setenv("MAX_JOBS", unset)
        assert setup_module.job_count() >= 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiler_named_by_nothing_but_a_space(setup_module, monkeypatch):
    monkeypatch.setenv("CXX", " ")
    assert setup_module.find_compiler() == ["c++"]


def test_the_compiler_that_is_there(setup_module, monkeypatch, tmp_path):
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_module.find_compiler() == ["clang++"]


# Stands in for a compiler that does not know an instruction: -c of a file that speaks of one fails.
OLD_COMPILER = """#!{python}
import sys
arguments = sys.argv[1:]
target = arguments[arguments.index("-o") + 1]
if "-c" in arguments:
    source = open(arguments[arguments.index("-c") + 1]).read()
    if "new_instruction" in source and "-DCCNET_LEAVE_OUT_KERNEL" not in arguments:
        sys.exit("unknown instruction")
open(target, "w").write(" ".join(arguments))
"""


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
def test_kernel_that_the_compiler_does_not_know_is_left_out(setup_module, monkeypatch, tmp_path, capfd):
    compiler = tmp_path / "c++"
    compiler.write_text(OLD_COMPILER.format(python=sys.executable))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    sources = [tmp_path / name for name in ("kernel_avx512bf16.cpp", "bind.cpp")]
    for source in sources:
        source.write_text("")
    sources[0].write_text("new_instruction")
    library = tmp_path / "out" / "library.so"
    build = setup_module.Build("library", tmp_path / "temp")
    build.run(sources, [], library)
    assert library.exists()
    told = capfd.readouterr().err
    assert "kernel_avx512bf16.cpp is left out" in told and "unknown instruction" in told
    # It is tried again, and told again; nothing else is.
    build.run(sources, [], library)
    again = capfd.readouterr()
    assert "kernel_avx512bf16.cpp is left out" in again.err and "bind.cpp -o" not in again.out
    # Any other file is needed.
    sources[1].write_text("new_instruction")
    with pytest.raises(setup_module.NotBuilt, match="unknown instruction"):
        build.run(sources, [], library)


def test_kernels_that_may_be_left_out_exist(setup_module):
    for name in setup_module.KERNELS_FOR_NEW_COMPILERS:
        assert "CCNET_LEAVE_OUT_KERNEL" in (ROOT / "csrc" / "cpu" / name).read_text()


@pytest.mark.parametrize(("version", "enough"), [("2.9.1+cu128", False), ("2.10.0", True), ("3.0.0a0", True)])
def test_the_oldest_torch(setup_module, monkeypatch, version, enough):
    monkeypatch.setattr(torch, "__version__", version)
    if enough:
        assert setup_module.import_torch() is torch
    else:
        with pytest.raises(
            setup_module.NotBuilt, match=r"needs torch 2\.10 or newer, and torch 2\.9\.1\+cu128"
        ):
            setup_module.import_torch()


def test_a_torch_whose_libraries_are_missing(setup_module, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so: cannot open shared object file')"
    )
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(setup_module.NotBuilt, match=r"^importing torch failed: libcudart\.so: cannot open"):
        setup_module.import_torch()


@pytest.mark.parametrize(
    ("wish", "forced", "required"),
    [
        ("", "1", []),
        ("1", "1", []),
        ("require", None, ["cpu"]),
        ("require", "0", ["cpu"]),
        ("require", "1", ["cpu", "cuda"]),
    ],
)
def test_what_has_to_be_built(setup_module, monkeypatch, wish, forced, required):
    monkeypatch.setenv("CCNET_EXT", wish)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    if forced is not None:
        monkeypatch.setenv("FORCE_CUDA", forced)
    extensions = setup_module.extensions()
    assert [extension.name for extension in extensions] == ["ccnet_d2.ops._C_cpu", "ccnet_d2.ops._C_cuda"]
    assert [e.name.rpartition("_")[2] for e in extensions if not e.optional] == required


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
def test_a_file_is_compiled_again_where_it_or_a_header_or_the_command_changes(
    setup_module, monkeypatch, tmp_path, capfd
):
    compiler = tmp_path / "c++"
    compiler.write_text(OLD_COMPILER.format(python=sys.executable))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    sources, header = [tmp_path / "a.cpp", tmp_path / "b.cpp"], tmp_path / "c.h"
    for path in (*sources, header):
        path.touch()

    def compiled():
        capfd.readouterr()
        setup_module.Build("library", tmp_path / "temp").run(sources, [header], tmp_path / "library.so")
        told = capfd.readouterr().out
        return [path.name for path in sources if f"-c {path}" in told]

    assert compiled() == ["a.cpp", "b.cpp"]
    assert compiled() == []
    for changed, again in ((sources[1], ["b.cpp"]), (header, ["a.cpp", "b.cpp"])):
        later = time.time() + 10
        os.utime(changed, (later, later))
        assert compiled() == again
        os.utime(changed, (1, 1))
        assert compiled() == []
    monkeypatch.setenv("CXXFLAGS", "-g")
    assert compiled() == ["a.cpp", "b.cpp"]
    assert compiled() == []
    monkeypatch.setattr(torch, "__version__", "2.99.0")  # another one in the same place
    assert compiled() == ["a.cpp", "b.cpp"]
    # A compiler that is killed leaves half a file, newer than all that it is made of.
    sources[0].write_text("new_instruction")
    with pytest.raises(setup_module.NotBuilt):
        compiled()
    (half,) = (tmp_path / "temp").rglob("a.cpp.o")
    half.write_text("half")
    sources[0].write_text("")
    os.utime(sources[0], (1, 1))
    assert compiled() == ["a.cpp"]


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_that_is_none(setup_module, monkeypatch, tmp_path, name):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(setup_module.NotBuilt, match=f"^{name}=.* has no bin/nvcc"):
        setup_module.find_cuda_toolkit()


def test_toolkit_of_cuda_home_or_else_of_path(setup_module, monkeypatch, tmp_path):
    for name in ("named", "on_path", "script"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / name / "bin" / "nvcc").chmod(0o755)
    for name in ("named", "on_path"):
        (tmp_path / name / "include").mkdir()
        (tmp_path / name / "include" / "cuda_runtime.h").touch()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path" / "bin"))
    assert setup_module.find_cuda_toolkit() == tmp_path / "on_path"
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "named"))
    assert setup_module.find_cuda_toolkit() == tmp_path / "named"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "script"))  # has no headers
    with pytest.raises(setup_module.NotBuilt, match=r"script has no bin/nvcc or no include/cuda_runtime\.h"):
        setup_module.find_cuda_toolkit()


@pytest.fixture
def cuda_build(setup_module, monkeypatch, tmp_path):
    """Makes a CudaBuild with a toolkit that has the version of torch's and nothing else."""
    (tmp_path / "bin").mkdir()
    release = torch.version.cuda
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FORCE_CUDA", "1")
    for name in ("CXX", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)

    def make(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return setup_module.CudaBuild("library", tmp_path / "temp")

    return make


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize(
    ("architectures", "wanted"), [("8.0", False), ("8.0;9.0+PTX", True), ("9.0a", True), ("8.0 10.0", False)]
)
def test_kernels_of_one_architecture(cuda_build, tmp_path, architectures, wanted):
    build = cuda_build(TORCH_CUDA_ARCH_LIST=architectures)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    hopper = [source for source in sources if source.name.startswith("hopper_")]
    assert len(hopper) == 2 and [s for s in sources if not build.is_wanted(s)] == ([] if wanted else hopper)
    # The binding asks for these kernels only where they are built.
    assert ("-DCCNET_HOPPER" in build.common) == wanted
    if wanted:
        command = build.compile_command(hopper[0], tmp_path / "object.o")
        assert [word for word in command if "gencode" in word] == ["-gencode=arch=compute_90a,code=sm_90a"]
    general = build.compile_command(next(s for s in sources if s not in hopper), tmp_path / "object.o")
    assert "-gencode=arch=compute_90a,code=sm_90a" not in general or architectures == "9.0a"


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_nvcc_takes_the_compiler_of_cxx(cuda_build, tmp_path):
    compiler, launcher = tmp_path / "own-g++", tmp_path / "ccache"
    for path in (compiler, launcher):
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)

    def host_compilers(**variables):
        command = cuda_build(**variables).compile_command(Path("kernels_float.cu"), tmp_path / "object.o")
        return [command[i + 1] for i, word in enumerate(command) if word == "-ccbin"]

    assert host_compilers() == []
    assert host_compilers(CXX=f"{compiler} -pipe") == [str(compiler)]
    assert host_compilers(CXX=f"{launcher} {compiler}") == [str(compiler)]
    assert host_compilers(NVCC_CCBIN="g++-13") == []


@pytest.mark.skipif(not TORCH_IS_NEW_ENOUGH, reason="the compiled op needs torch 2.10")
@pytest.mark.parametrize(
    ("forced", "of_torch", "gpu", "words"),
    [
        ("0", "12.4", True, "FORCE_CUDA=0 asks to leave it out"),
        ("yes", "12.4", True, "FORCE_CUDA=yes is unknown: set 1"),
        ("", None, True, "built without CUDA"),
        ("", "12.4", False, "torch sees no GPU here: set FORCE_CUDA=1"),
        ("1", "11.8", False, r"of CUDA 12\.9 and torch of CUDA 11\.8: .* same major version"),
        ("1", "12.4", False, ""),
        ("", "12.4", True, ""),
    ],
)
def test_where_the_library_for_cuda_is_built(
    cuda_build, setup_module, monkeypatch, tmp_path, forced, of_torch, gpu, words
):
    (tmp_path / "bin" / "nvcc").write_text(
        "#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.1'\n"
    )
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if words:
        with pytest.raises(setup_module.NotBuilt, match=words):
            cuda_build(FORCE_CUDA=forced)
    else:
        assert cuda_build(FORCE_CUDA=forced).nvcc == tmp_path / "bin" / "nvcc"
