#!/usr/bin/env python3
"""Comparison tables from the result files of the other three scripts: the same as `phase1 tables`."""

import sys

from phase1.cli import main

if __name__ == "__main__":
    sys.exit(main(["tables", *sys.argv[1:]]))
