"""Published checkpoints of other code bases as Detectron2 ones: CCNet of the official code and of mmsegmentation,
ImageNet ResNets of torchvision, timm, mmsegmentation (ResNetV1c) and MIT.

Example:
    >>> conversion = convert_file("ccnet_r50-d8_512x1024_40k_cityscapes.pth", "ccnet.pth")  # doctest: +SKIP
    >>> print(conversion.text())  # doctest: +SKIP
"""

from .conversion import convert_file, convert_weights
from .layouts import LAYOUTS, detect_layout
from .report import Conversion
from .source import read_weights

__all__ = ["LAYOUTS", "Conversion", "convert_file", "convert_weights", "detect_layout", "read_weights"]
