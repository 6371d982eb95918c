import re
import subprocess
import sys

import pytest
import torch

from ccnet_d2 import collect_env
from ccnet_d2.collect_env import collect_env_info
from ccnet_d2.ops import available_backends, compiled


def test_report_names_versions_and_backends():
    done = subprocess.run([sys.executable, "-m", "ccnet_d2.collect_env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    reason = available_backends()["compiled"]
    if reason is None:
        assert 'backend="auto" on cpu: compiled' in done.stdout
        assert f"float32 {compiled.instruction_set(torch.float32)}" in done.stdout
    else:
        assert 'backend="auto" on cpu: matmul' in done.stdout
        assert f"compiled on cpu: not available: {reason}" in done.stdout
    # Once for each kind of device.
    assert re.findall(r"^ +(compiled[^:]*):", done.stdout, re.MULTILINE) == [
        "compiled on cpu",
        "compiled on cuda",
    ]
    cuda = compiled.unavailable_reason("cuda")
    assert cuda is None or f"compiled on cuda: not available: {cuda}" in done.stdout


def test_the_command_line_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as help_asked:
        collect_env.main(["--help"])
    assert help_asked.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m ccnet_d2.collect_env") and "torch" not in printed
    with pytest.raises(SystemExit) as refused:
        collect_env.main(["--jsn"])
    assert refused.value.code == 2 and "--jsn" in capsys.readouterr().err


@pytest.mark.skipif(not compiled.is_available(), reason=str(compiled.unavailable_reason()))
def test_report_names_an_instruction_set_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CCNET_CPU_ISA", "AVX2")
    report = collect_env_info()
    assert "compiled on cpu: fails: CCNET_CPU_ISA=AVX2 is unknown: choose portable" in report


def test_report_names_the_gpus_and_what_the_environment_sets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    report = collect_env_info()
    assert re.search(r"^GPU +none that torch sees$", report, re.MULTILINE)
    assert re.search(r"^CUDA_VISIBLE_DEVICES +2,3$", report, re.MULTILINE)
    assert not re.search(r"^FORCE_CUDA ", report, re.MULTILINE)  # other rows may advise to set it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    rows = collect_env._gpus()
    assert rows == [(f"GPU {i}", f"Card {i}, compute capability 8.{i}") for i in range(2)]
    assert collect_env._version("no-such-distribution") == "not installed"
