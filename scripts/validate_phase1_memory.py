#!/usr/bin/env python3
"""Peak training memory of the engine and the Transformer baselines: the same as `phase1 memory`."""

import sys

from _start import run

if __name__ == "__main__":
    sys.exit(run("memory"))
