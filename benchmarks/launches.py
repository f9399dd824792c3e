"""Times of the kernels of the mixer's core for other chunks, blocks of keys, warps and stages than the usual ones.

    python benchmarks/launches.py [--rank 32] [--batch-size 64] [--seq-length 512]

Each launch differs from the usual one in one number, or in chunk and warps alike. Gradients are compared with those of the
usual launches, which the operator's own check proves: what differs by more than rounding is wrong, not fast. Needs a GPU.
Prints a line a launch, the fastest of a kernel first, and writes launches.json into --out-dir.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ar_ssm import times, training_step
from torch import Tensor

from phase1.files import atomic_write
from phase1.machine.environment import current_command, environment
from phase1.ops.ar_ssm import core
from phase1.ops.ar_ssm.core import Launch, Launches, launches_for
from phase1.ops.compile_together import compile_together

KERNELS = {
    "forward": "forward_kernel",
    "far_u": "far_backward_u_kernel",
    "far_v": "far_backward_v_kernel",
    "near_q": "near_backward_q_kernel",
    "near_keys": "near_backward_keys_kernel",
}
CHUNKS, KEYS, WARPS, STAGES = (16, 32, 64), (16, 32, 64), (1, 2, 4, 8), (1, 2, 3, 4)
ROUNDING = 0.02  # relative, between results of FP16 whose sums are in another order
WHAT = "FP16, µs of the kernel; error: largest relative difference of the result or a gradient from those of the usual launches"


def variants(usual: Launch, keys: bool) -> Iterator[Launch]:
    """The usual launch and its neighbours."""
    yield usual
    for name, values in (("chunk", CHUNKS), ("keys", KEYS if keys else ()), ("warps", WARPS), ("stages", STAGES)):
        yield from (replace(usual, **{name: value}) for value in values if value != getattr(usual, name))
    for factor in (0.5, 2.0):
        chunk, warps = int(usual.chunk * factor), int(usual.warps * factor)
        if chunk in CHUNKS and warps in WARPS:
            yield replace(usual, chunk=chunk, warps=warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--out-dir", default="results/benchmarks")
    options = parser.parse_args()
    device = torch.device("cuda")
    sizes = options.batch_size, options.seq_length, options.rank, options.head_dim, options.window, device
    usual = launches_for(options.rank, options.head_dim, torch.float16)
    tried = [(name, one) for name in KERNELS for one in variants(getattr(usual, name), name.startswith(("near", "forward")))]
    compile_together(partial(all_at_once, tried, usual, sizes))
    exact, rows = gradients(*sizes), []
    for name, one in tried:
        with using(replace(usual, **{name: one})):
            found = measured(KERNELS[name], sizes, exact)
        row = {"kernel": name, **asdict(one), "usual": one == getattr(usual, name)} | found
        rows.append(row)
        print(line(row), flush=True)
    rows.sort(key=lambda row: (list(KERNELS).index(row["kernel"]), row["microseconds"] or float("inf")))
    print("\n" + "\n".join(map(line, rows)))
    settings = {name: value for name, value in vars(options).items() if name != "out_dir"}
    facts = {"environment": environment(), "command": current_command(), "what": WHAT, "options": settings, "rows": rows}
    atomic_write(Path(options.out_dir) / "launches.json", json.dumps(facts, indent=1).encode())


def using(launches: Launches) -> Any:
    """Within the block the core is launched like this."""
    return patch.object(core, "launches_for", return_value=launches)


def all_at_once(tried: list[tuple[str, Launch]], usual: Launches, sizes: tuple[Any, ...]) -> None:
    """Launch every kernel that will run."""
    for name, one in tried:
        with using(replace(usual, **{name: one})):
            training_step(*sizes)()


def measured(kernel: str, sizes: tuple[Any, ...], exact: list[Tensor]) -> dict[str, Any]:
    """Time and error of the launches in force; no time where they are refused or wrong."""
    try:
        pairs = zip(gradients(*sizes), exact, strict=True)
        error = max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)
        if not error <= ROUNDING:
            return {"microseconds": None, "error": error, "note": "wrong"}
        return {"microseconds": times(*sizes)[kernel], "error": error, "note": ""}
    except Exception as refusal:  # whatever the compiler raises
        return {"microseconds": None, "error": None, "note": f"{type(refusal).__name__}: {refusal}".splitlines()[0][:100]}


def gradients(*sizes: Any) -> list[Tensor]:
    """The result and all gradients, of the same operands each time."""
    step = training_step(*sizes, torch.Generator(sizes[-1]).manual_seed(0))
    return [found.detach().double() for found in step()]


def line(row: dict[str, Any]) -> str:
    time = "      -" if row["microseconds"] is None else f"{row['microseconds']:7.1f}"
    blocks = f"chunk {row['chunk']:3d}, keys {row['keys']:3d}, {row['warps']} warps, {row['stages']} stages"
    return f"{row['kernel']:10s} {time} µs  {blocks}  {'usual ' * row['usual']}{row['note']}"


if __name__ == "__main__":
    main()
