"""Models by name, with published weights if asked for."""

import torch
from torch import nn

from ccnet_d2.checkpoint import load_checkpoint
from ccnet_d2.devices import available_device
from ccnet_d2.instantiation import build_object

from .configs_dir import config_names, get_config
from .published import PUBLISHED


def get(name: str, trained: bool = False, device: str | torch.device | None = None) -> nn.Module:
    """A run's model.

    Args:
        name: a run, such as "cityscapes/ccnet_R_50_D8_512x1024_40k".
        trained: with the weights that were published for it, in evaluation mode. They are fetched and converted the
            first time and cached (CCNET_D2_CACHE); CCNET_D2_ZOO names a local folder or a mirror to take them from.
            Without, the model has random weights and is in training mode.
        device: where to put it; the run's own `train.device`, the GPU if there is one, unless given.

    Returns:
        A model with Detectron2's inputs and outputs, see `ccnet_d2.modeling.CCNet`.

    Raises:
        UserError: there is no such run or device, or `trained` is asked for and there are no weights, they cannot be
            had, or they are not what was published.
    """
    cfg = get_config(name, trained=trained)
    device = available_device(device or cfg.train.device)
    model = build_object(cfg, "model")
    if trained:
        load_checkpoint(model, cfg.train.init_checkpoint)
        model.eval()
    return model.to(device)


def list_models(trained: bool = False) -> list[str]:
    """Names of all runs, or of those with published weights."""
    names = config_names()
    return [name for name in names if name.removesuffix(".py") in PUBLISHED] if trained else names
