"""Compiles the Triton kernels of a piece of work side by side: one after the other they take a minute on a slow host."""

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Launch = tuple[Any, Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, arguments and options."""


def compile_together(work: Callable[[], object]) -> None:
    """Compile every kernel that `work` launches, as many at a time as there are processors; nothing is launched.

    `work` is called, and its kernels' results hold whatever is in memory: what it does must not depend on them. Nothing
    happens with a Triton that compiles one kernel at a time, or in its interpreter.
    """
    if not compiles_side_by_side() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    # gradients are computed by this thread too, whose launches are noted
    with torch.autograd.set_multithreading_enabled(False), _launches_noted() as launches:
        work()
    with side_by_side():
        for kernel, grid, arguments, options in launches:
            kernel.warmup(*arguments, grid=grid, **options)


def compiles_side_by_side() -> bool:
    """Whether this Triton can: from 3.6 on."""
    import triton  # takes a second to import

    mode = getattr(triton, "AsyncCompileMode", None)
    return mode is not None and "ignore_errors" in inspect.signature(mode).parameters


@contextmanager
def side_by_side() -> Iterator[None]:
    """Kernels that this thread compiles within the block are ready at its end.

    An error is raised again where the kernel is launched: Triton 3.6 would stay in this mode after one.
    """
    import triton

    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        yield


@contextmanager
def _launches_noted() -> Iterator[list[Launch]]:
    """Within the block launches by this thread are noted, not made."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    here, own, usual = threading.get_ident(), vars(JITFunction).get("__getitem__"), JITFunction.__getitem__

    def noting(kernel: Any, grid: Any) -> Any:
        if threading.get_ident() != here:
            return usual(kernel, grid)
        return lambda *arguments, **options: launches.append((kernel, grid, arguments, options))

    JITFunction.__getitem__ = noting
    try:
        yield launches
    finally:
        if own is None:
            del JITFunction.__getitem__  # it is inherited
        else:
            JITFunction.__getitem__ = own
