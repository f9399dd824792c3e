"""Compile the kernels of AR-SSM's check together, for a card that is not here; print what was compiled then, and what later.

Not in Triton's interpreter, which the tests' own process has.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import threading
from types import SimpleNamespace

import torch
from ahead import Card
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from phase1.ops import compile_together as module
from phase1.ops.ar_ssm import self_check

compiled, threads = [], set()


def note(**facts: object) -> bool:
    compiled.append(facts["key"])
    threads.add(threading.get_ident())
    return False


def work() -> None:
    self_check.worst_error(torch.device("cpu"), 8, 16, 8, 10, torch.float16)


def elsewhere() -> None:
    thread = threading.Thread(target=lambda: seen.append(kernel[(1,)](3)))
    thread.start()
    thread.join()


driver.set_active(Card(86))
knobs.runtime.jit_cache_hook = note
module.compile_together(work)
first = len(compiled)
assert "__getitem__" not in vars(JITFunction)
with torch.autograd.set_multithreading_enabled(False), module._launches_noted() as launches:
    work()
for one, grid, arguments, options in launches:
    one.warmup(*arguments, grid=grid, **options)
seen, kernel = [], JITFunction.__new__(JITFunction)
kernel.run = lambda *arguments, grid, warmup: SimpleNamespace(grid=grid, arguments=arguments)
with module._launches_noted() as noted:
    kernel[(2,)](4)
    elsewhere()
assert len(noted) == 1 and noted[0][1:3] == ((2,), (4,)) and seen[0].arguments == (3,), (noted, seen)
print(first, len(compiled) - first, len(launches))
