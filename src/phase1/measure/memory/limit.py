"""A limit on the memory of a card: what `--vram-limit` and `--card` mean, and how a run is held to it."""

import gc
import re
from typing import TypeVar

import torch

from phase1.config import ModelConfig
from phase1.machine.cards import card_for
from phase1.machine.isolate import Outcome
from phase1.measure.workload import make_workload, random_batch
from phase1.records.schema import Basis
from phase1.training.step import train_step

T = TypeVar("T")

_UNITS = {"": 1} | {f"{prefix}b": 1000**i for i, prefix in enumerate(("", "k", "m", "g", "t"))}
_UNITS |= {prefix: 1000**i for i, prefix in enumerate(("k", "m", "g", "t"), 1)}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate(("k", "m", "g", "t"), 1)}
SMALLEST = 10**6  # bytes of a limit: less is a unit forgotten
SHORT_SEQUENCE = 64  # tokens of the step that loads the libraries


def basis(vram_limit_bytes: int | None, dry_run: bool = False) -> Basis:
    """What the numbers of this machine are: a capped GPU emulates a card, without a GPU or for a dry run they are estimates."""
    if dry_run or not torch.cuda.is_available():
        return "estimated"
    return "measured" if vram_limit_bytes is None else "emulated"


def parse_bytes(text: str) -> int:
    """Bytes of "8GB" or "8G" (10^9), "7.2 GB", "8GiB" (2^30) or "7200000000"; ValueError for anything else, and below 1 MB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", text.lower())
    size = round(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise ValueError(f"--vram-limit must be a size such as 8GB (decimal), 8GiB or 7200000000 (bytes); got {text!r}")
    if size < SMALLEST:
        meant = f"{found[1]}GB" if found and not found[2] and size < 1000 else "8GB"
        raise ValueError(f"--vram-limit must be at least 1MB; got {text!r}, {size:,} bytes; did you mean {meant}?")
    return size


def limit_bytes(vram_limit: str | None, card: str | None) -> int | None:
    """What the two flags allow a process to take of the card; None where neither is given, ValueError where both are."""
    if vram_limit is not None and card is not None:
        raise ValueError(f"--card {card} sets the limit to that card's usable bytes; got --vram-limit too; give one of the two")
    if card is not None:
        return card_for(card).usable_bytes
    return None if vram_limit is None else parse_bytes(vram_limit)


def check_limit(limit: int | None, card_bytes: int | None) -> None:
    """Raise ValueError for a limit that is larger than the card the run would be held to it on."""
    if limit is not None and card_bytes is not None and limit > card_bytes:
        raise ValueError(
            f"a limit must be at most the {card_bytes / 1e9:.2f} GB of this card; got {limit / 1e9:.2f} GB; "
            "a larger card cannot be emulated"
        )


def cap_memory(model: ModelConfig, limit: int | None) -> None:
    """Hold this process to `limit` bytes of the first GPU: what the allocator reserves and what is outside it, together.

    Call it first in a fresh process. A step of one short sequence makes the context and loads libraries and kernels, as no
    allocator counts those; the allocator may then have the rest, and says "out of memory" where that is not enough. Memory of
    other programs on the card is outside the allocator too.
    Raises ValueError for a limit larger than the card, MemoryError where nothing is left for the allocator.
    """
    if limit is None:
        return
    check_limit(limit, torch.cuda.mem_get_info()[1])
    train_step(make_workload(model, "cuda"), [random_batch(model.vocab_size, 1, SHORT_SEQUENCE, "cuda")])
    gc.collect()
    torch.cuda.empty_cache()
    outside, total = outside_bytes(), torch.cuda.mem_get_info()[1]
    if outside >= limit:
        raise MemoryError(f"out of memory: {outside / 1e9:.2f} GB outside the allocator, of a limit of {limit / 1e9:.2f} GB")
    torch.cuda.set_per_process_memory_fraction((limit - outside) / total)
    torch.cuda.reset_peak_memory_stats()


def outside_bytes() -> int:
    """Memory in use on the first GPU that is not the allocator's: contexts, libraries, other programs."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def within_limit(outcome: Outcome[T], needed_bytes: int | None, limit: int | None, found_by: Basis) -> Outcome[T]:
    """`outcome`, or out of memory where it needs more than the limit.

    This is how an estimate meets a limit. A capped run meets it only if more was loaded after the cap was set.
    """
    if limit is None or needed_bytes is None or needed_bytes <= limit:
        return outcome
    needs = f"a step needs {needed_bytes / 1e9:.2f} GB ({found_by}) with what is outside the allocator"
    return Outcome("oom", outcome.value, f"out of memory: {needs}, of a limit of {limit / 1e9:.2f} GB")
