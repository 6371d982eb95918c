"""The project's configs by name."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .configs_dir import config_names, config_path, get_config

__all__ = ["config_names", "config_path", "get_config"]
