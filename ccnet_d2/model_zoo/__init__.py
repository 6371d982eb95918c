"""The project's configs by name."""

from .configs_dir import config_names, config_path, get_config

__all__ = ["config_names", "config_path", "get_config"]
