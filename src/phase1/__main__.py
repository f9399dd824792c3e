"""`python -m phase1` is the command `phase1`."""

import sys

from phase1.cli import main

if __name__ == "__main__":
    sys.exit(main())
