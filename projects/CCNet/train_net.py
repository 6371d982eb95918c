#!/usr/bin/env python
"""Train or evaluate a LazyConfig run of ccnet_d2: see --help."""

import sys

from ccnet_d2.engine.command_line import main

if __name__ == "__main__":
    sys.exit(main())
