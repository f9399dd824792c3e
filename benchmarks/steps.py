"""Time of a training step among others, compiled and replayed as CUDA graphs, and its kernels.

    python benchmarks/steps.py ROLE B T [FIELD=VALUE ...]

ROLE is a model of `phase1 throughput` (phase1, baseline, ...), FIELD one of its settings (checkpointing=False, the older name
of recompute=none, loss=chunked, htt_output=two_level). Steps follow each other as in training: the host does not wait for one
before it launches the next. Writes its row of steps.json in --out-dir; other rows stay. Needs a GPU.
"""

import argparse
import fcntl
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from phase1.config import EngineShape, TrainConfig, present_settings
from phase1.files import atomic_write
from phase1.machine.environment import environment
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.training.proof import prove_compiled
from phase1.training.step import make_train_state, train_step

WARMUP, MEASURED = 5, 12
WHAT = (
    f"median of {MEASURED} training steps one after the other, FP16, compiled, CUDA graphs; a row a process, alone on its card"
)
SAME = ("role", "batch_size", "seq_length", "settings", "optimizer")  # of a row: which step it is


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("seq_length", type=int)
    parser.add_argument("settings", nargs="*", help="FIELD=VALUE of the model")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=TrainConfig.optimizer)
    parser.add_argument("--out-dir", default="results/benchmarks")
    options = parser.parse_args()
    settings = dict(setting.split("=") for setting in options.settings)
    read = {name: {"True": True, "False": False}.get(value, value) for name, value in settings.items()}
    B, T = options.batch_size, options.seq_length
    torch.manual_seed(0)
    model = LanguageModel(model_config(options.role, EngineShape(), **present_settings(read)))
    state = make_train_state(model, TrainConfig(compile=True, cuda_graphs=True, optimizer=options.optimizer), "cuda")
    ids = (torch.rand(B, T + 1, generator=torch.Generator().manual_seed(1)) ** 4 * 50_000).long().cuda()
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    prove_compiled(state, batch[0])
    losses = [train_step(state, batch).item() for _ in range(WARMUP)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(MEASURED + 1)]
    ends[0].record()
    for end in ends[1:]:
        train_step(state, batch)
        end.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(end) for before, end in pairwise(ends)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        train_step(state, batch)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name.split("(")[0][:60], []).append(event.device_time / 1e3)
    longest = sorted(kernels.items(), key=lambda kernel: -sum(kernel[1]))
    milliseconds = statistics.median(times)
    facts = environment()
    row = {
        "role": options.role, "batch_size": B, "seq_length": T, "settings": settings, "optimizer": options.optimizer,
        "milliseconds": milliseconds, "samples": times, "tokens_per_s": 1e3 * B * T / milliseconds, "losses": losses,
        "kernels": sum(map(len, kernels.values())), "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "git_commit": facts["git_commit"], "milliseconds_by_kernel": {name: [len(t), sum(t)] for name, t in longest},
    }  # fmt: skip
    keep(row, facts, Path(options.out_dir) / "steps.json")
    print(
        f"{options.role} {' '.join(options.settings)}: {milliseconds:.2f} ms, {row['tokens_per_s'] / 1e3:.0f}k tokens/s, "
        f"{row['kernels']} kernels a step, peak {row['peak_allocated_bytes'] / 1e9:.2f} GB"
    )


def keep(row: dict[str, Any], facts: dict[str, Any], file: Path) -> None:
    """Write `row` in the place of an earlier one of the same step; runs on other GPUs may write meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        rows = [other for other in rows if any(other[name] != row[name] for name in SAME)] + [row]
        rows.sort(key=lambda row: (row["seq_length"], row["batch_size"], row["role"], len(row["settings"])))
        record = {
            "environment": facts,
            "command": "python benchmarks/steps.py ROLE B T [FIELD=VALUE ...]",
            "what": WHAT,
            "rows": rows,
        }
        atomic_write(file, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
