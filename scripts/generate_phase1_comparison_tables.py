#!/usr/bin/env python3
"""Comparison tables from the result files of the other three scripts: the same as `phase1 tables`."""

import sys

from _start import run

if __name__ == "__main__":
    sys.exit(run("tables"))
