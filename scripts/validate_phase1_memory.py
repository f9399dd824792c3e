#!/usr/bin/env python3
"""Peak training memory of the engine and the Transformer baselines: the same as `phase1 memory`."""

import sys

from phase1.cli import main

if __name__ == "__main__":
    sys.exit(main(["memory", *sys.argv[1:]]))
