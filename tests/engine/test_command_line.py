"""What train_net.py says about its own arguments, before anything is written."""

import pytest
import torch

from ccnet_d2.engine.command_line import main

LAZY, YACS = "toy/ccnet_synthetic.py", "yacs/toy/ccnet_synthetic.yaml"


@pytest.mark.parametrize("config, change", [(LAZY, ["train.max_iter=2"]), (YACS, ["SOLVER.MAX_ITER", "2"])])
def test_options_behind_values_of_the_config(config, change, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--config-file", config, *change, "--resume"])
    assert exit.value.code == 2
    assert f"--resume stands behind {change[0]}: options come before" in capsys.readouterr().err


def test_yacs_config_for_a_gpu_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "output"
    assert main(["--config-file", YACS, "OUTPUT_DIR", str(output)]) != 0
    assert "MODEL.DEVICE is cuda, but torch sees no GPU: take 'cpu'." in capsys.readouterr().err
    assert not output.exists()
