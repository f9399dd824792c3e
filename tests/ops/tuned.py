"""Tune a kernel of several forms, one of which does not compile, on a card that is not here; print how many are compiled when they are timed."""

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import torch
import triton
import triton.language as tl
from ahead import Card
from triton import knobs
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from tune_together import tune_together

FORMS = [triton.Config({"BLOCK": size}) for size in (16, 32, 64, 3)]  # 3: no power of 2
compiled, timed = [], []


@triton.autotune(FORMS, key=["n"])
@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


def time(tuner, *arguments, config, **meta):
    before = len(compiled)
    try:
        made = tuner.fn.run(*arguments, **meta | config.all_kwargs() | {"warmup": True})
        if hasattr(made, "result"):  # as a launch asks for it, which raises what the compiler has raised
            made.result()
        timed.append(len(compiled) - before)
    except triton.CompilationError:
        return [float("inf")] * 3
    return [float(config.kwargs["BLOCK"])] * 3


driver.set_active(Card(90))
knobs.runtime.jit_cache_hook = lambda **facts: compiled.append(facts["key"])
Autotuner._bench = time
tune_together()
x = torch.zeros(64)
copy.run(x, torch.zeros(64), 64, grid=(1,), warmup=True)
assert copy.best_config.kwargs["BLOCK"] == 16
print(*timed)
