"""What Detectron2 builds: backbones, heads and meta-architectures. Importing this registers them."""

import ccnet_d2.compat  # first: it imports Detectron2 without its warnings
import ccnet_d2.path_handler  # noqa: F401  ccnet://NAME is a checkpoint

from .add_rcca import add_rcca
from .backbone import PlainConvNet, build_resnet, rcca_resnet, resnet_output_shape
from .ccnet import CCNet
from .ccnet3d import CCNet3D
from .ccnet_head import CCNetHead
from .ce2p_head import CE2PHead
from .config import add_ccnet_config
from .ranet_head import RANetHead

__all__ = [
    "CCNet",
    "CCNet3D",
    "CCNetHead",
    "CE2PHead",
    "PlainConvNet",
    "RANetHead",
    "add_ccnet_config",
    "add_rcca",
    "build_resnet",
    "rcca_resnet",
    "resnet_output_shape",
]
