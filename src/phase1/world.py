"""The processes that torchrun starts for one run, and which of them this is: from its environment, without PyTorch."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def size() -> int:
    """How many processes the run has; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def is_first() -> bool:
    """Whether this process prints and writes: rank 0 alone does."""
    return rank() == 0


def name() -> str:
    """For a line about this process; empty where it is the only one."""
    return f" (rank {rank()} of {size()})" if size() > 1 else ""


class _Silence(io.TextIOBase):
    """Takes every text and shows none."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def first_speaks() -> Iterator[None]:
    """Within the block what ranks other than 0 print is shown nowhere; `speak` ends that."""
    before = sys.stdout, sys.stderr
    if not is_first():
        sys.stdout, sys.stderr = _Silence(), _Silence()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def speak() -> None:
    """From here on what this rank prints on standard error is shown: it is the one that failed."""
    if not is_first():
        sys.stderr = sys.__stderr__ or sys.stderr
