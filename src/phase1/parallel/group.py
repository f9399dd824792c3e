"""What all ranks of a run compute together; every function is trivial in a run of one process.

Each is called by all ranks, in the same order. On a GPU sums go through NCCL, everything else through gloo on the CPU: a
rank that has died is an error of gloo's at once, and one that waits for NCCL waits for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from phase1.errors import Unavailable

T = TypeVar("T")
OUT_OF_MEMORY, FAILED = 1, 2  # of a rank that is not well
PATIENCE: Final = timedelta(minutes=30)  # of a rank with the others: rank 0 may make a tokenizer or a checkpoint meanwhile


class Lost(Unavailable):
    """Another rank can no longer be reached."""


class PeerFailed(RuntimeError):
    """Another rank could not do its part of a step, and says so itself."""


def together() -> bool:
    """Whether this process is one of several that compute together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if together() else 0


def size() -> int:
    return dist.get_world_size() if together() else 1


@contextmanager
def _peers() -> Iterator[None]:
    """An error of the connection is one of its own: it is no fault of this rank."""
    try:
        yield
    except (RuntimeError, EOFError) as error:
        raise Lost(f"the connection to another rank broke: {str(error).splitlines()[0][:200]}") from error


def most(*numbers: int) -> list[int]:
    """Of each number, not negative and small, the largest of all ranks."""
    if not together():
        return list(numbers)
    values = torch.tensor(numbers)
    with _peers():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def any_of(*flags: bool) -> list[bool]:
    """Of each flag, whether it is true on some rank."""
    return [number > 0 for number in most(*map(int, flags))]


def gate(status: int = 0) -> None:
    """Wait until all ranks are here and well; a rank that is not calls it with why, and once.

    Raises PeerFailed where another rank is not.
    """
    (worst,) = most(status)
    if worst > status:
        raise PeerFailed("another rank ran out of memory" if worst == OUT_OF_MEMORY else "another rank failed")


def sum_(tensor: Tensor) -> Tensor:
    """`tensor`, on any device, added up over all ranks in place."""
    if together():
        with _peers():
            dist.all_reduce(tensor)
    return tensor


def stacked(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape and on any device, (N, ...)."""
    if not together():
        return tensor[None]
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size())]
    with _peers():
        dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def from_first(make: Callable[[], T]) -> T:
    """What `make()` gives on rank 0, on all ranks; it is called there alone."""
    if not together():
        return make()
    box: list[Any] = [make() if rank() == 0 else None]
    with _peers():
        dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(value: T) -> list[T]:
    """The values of all ranks, by rank."""
    if not together():
        return [value]
    values: list[Any] = [None] * size()
    with _peers():
        dist.all_gather_object(values, value)
    return values


def first_before_others(make: Callable[[], T]) -> T:
    """`make()` on all ranks, on rank 0 before it begins on the others: they find what it has put into a cache."""
    if rank() > 0:
        gate()
        return make()
    value = make()
    gate()
    return value
