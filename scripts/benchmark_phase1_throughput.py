#!/usr/bin/env python3
"""Training throughput over sequence lengths, and whether it is linear: the same as `phase1 throughput`."""

import sys

from phase1.cli import main

if __name__ == "__main__":
    sys.exit(main(["throughput", *sys.argv[1:]]))
