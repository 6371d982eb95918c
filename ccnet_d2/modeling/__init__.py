"""What Detectron2 builds: backbones, heads and meta-architectures. Importing this registers them."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .backbone import PlainConvNet, build_resnet, resnet_output_shape
from .ccnet import CCNet
from .ccnet_head import CCNetHead
from .config import add_ccnet_config

__all__ = ["CCNet", "CCNetHead", "PlainConvNet", "add_ccnet_config", "build_resnet", "resnet_output_shape"]
