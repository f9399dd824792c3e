"""What the four scripts share: they run from a checkout as it is, installed or not."""

import sys
from pathlib import Path


def run(command: str) -> int:
    """The exit status of `phase1 command` with this process's arguments, of the sources beside this folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from phase1.cli import main

    return main([command, *sys.argv[1:]])
