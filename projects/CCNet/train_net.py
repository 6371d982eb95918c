#!/usr/bin/env python
"""Train or evaluate a LazyConfig run of ccnet_d2: see --help."""

from ccnet_d2.engine.command_line import main
from ccnet_d2.script_exit import exit_with

if __name__ == "__main__":
    exit_with(main)
