"""The project's configs and published weights by name.

from ccnet_d2 import model_zoo

model = model_zoo.get("cityscapes/ccnet_R_50_D8_512x1024_40k", trained=True)
"""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings
from ccnet_d2.path_handler import PublishedWeightsHandler

from .cache import cache_dir, weights_file
from .configs_dir import config_names, config_path, get_config
from .models import get, list_models
from .published import PUBLISHED, Published

list = list_models
"""`model_zoo.list()`, `model_zoo.list(trained=True)`: see `list_models`."""

__all__ = [
    "PUBLISHED",
    "Published",
    "PublishedWeightsHandler",
    "cache_dir",
    "config_names",
    "config_path",
    "get",
    "get_config",
    "list",
    "list_models",
    "weights_file",
]
