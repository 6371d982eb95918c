import subprocess
import sys

BLOCKED = ("numpy", "torchvision", "detectron2", "fvcore", "scipy", "PIL")


def test_losses_need_torch_alone():
    # None in sys.modules makes an import fail as if the package were not installed.
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        "import torch, ccnet_d2.losses as losses\n"
        "target = torch.zeros(1, 9, 9, dtype=torch.long)\n"
        "for loss in (losses.CrossEntropy(), losses.OHEMCrossEntropy(), losses.CategoryConsistentLoss()):\n"
        "    assert torch.isfinite(loss(torch.randn(1, 4, 3, 3), target))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
