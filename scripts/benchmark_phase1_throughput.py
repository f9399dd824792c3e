#!/usr/bin/env python3
"""Training throughput over sequence lengths, and whether it is linear: the same as `phase1 throughput`."""

import sys

from _start import run

if __name__ == "__main__":
    sys.exit(run("throughput"))
