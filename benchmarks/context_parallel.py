"""One long sequence over the GPUs of a machine against one GPU: time of a step, peak memory, and equal gradients.

    python benchmarks/context_parallel.py [--gpus 2] [--seq-length 262144] [--recompute MODE] [--smoke]

Every rank takes its stretch (phase1.training.context_parallel); rank 0 then takes the whole sequence alone. Both steps are
forward, backward, sum of gradients, clipping and the optimizer. Writes context_parallel.json into --out-dir, beside the rows of
other settings. --smoke: tiny sizes, also on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from phase1.config import EngineShape, Recompute, TrainConfig
from phase1.files import atomic_write
from phase1.machine.environment import environment
from phase1.measure.workload import random_batch
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.training.context_parallel import Context, ContextMicroBatch, stretches
from phase1.training.micro_batch import MicroBatch
from phase1.training.step import TrainState, make_train_state

WARMUP, MEASURED, SECONDS = 3, 7, 150.0
TINY = EngineShape(
    vocab_size=300, d_model=16, n_layers=2, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4, htt_rank=2,
    htt_dense_rows=4, htt_groups=10, copy_window=8,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=2**18)
    parser.add_argument("--recompute", default="none", choices=get_args(Recompute), help="what of blocks in the backward pass")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, 200 tokens, on a CPU too")
    parser.add_argument("--out-dir", default="results/benchmarks")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return measure(options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}"]
    try:
        return subprocess.run([*command, __file__, *sys.argv[1:]], timeout=SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"context_parallel: no result within {SECONDS:g} s", file=sys.stderr)
        return 1


def measure(options: argparse.Namespace) -> int:
    """On every rank."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cpu" if options.smoke and not torch.cuda.is_available() else "cuda"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    T = 200 if options.smoke else options.seq_length
    torch.manual_seed(0)
    config = model_config("phase1", TINY if options.smoke else EngineShape(), recompute=options.recompute)
    state = make_train_state(LanguageModel(config), TrainConfig(), device)
    state.scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=state.scaler.is_enabled())  # no skipped step
    whole = MicroBatch(state.model, state.scaler, state.dtype)
    ids, targets = random_batch(config.vocab_size, 1, T, device)
    context = Context(stretches(T, size), rank)
    own = slice(context.start, context.start + context.lengths[rank])
    spread = ContextMicroBatch(whole, context)
    part = context.lengths[rank] / T

    def together() -> torch.Tensor:
        loss = gradients(spread, ids[:, own].contiguous(), targets[:, own].contiguous(), part)
        flat = torch.cat([loss.view(1), *(p.grad.flatten() for p in state.model.parameters() if p.grad is not None)])
        dist.all_reduce(flat)
        held = [p.grad for p in state.model.parameters() if p.grad is not None]
        sums = flat[1:].split([gradient.numel() for gradient in held])
        torch._foreach_copy_(held, [part.view_as(gradient) for part, gradient in zip(sums, held, strict=True)])
        return flat

    def alone() -> torch.Tensor:
        loss = gradients(whole, ids, targets, 1.0)
        return torch.cat([loss.view(1), *(p.grad.flatten() for p in state.model.parameters() if p.grad is not None)])

    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    spent, peak, flat = timed(state, together, device)
    dist.barrier()
    if rank == 0:
        state.model.load_state_dict(start)
        state.optimizer.state.clear()
        spent_alone, peak_alone, flat_alone = timed(state, alone, device)
        record = {
            "gpus": size,
            "seq_length": T,
            "recompute": options.recompute,
            "milliseconds": spent,
            "milliseconds_alone": spent_alone,
            "speedup": statistics.median(spent_alone) / statistics.median(spent),
            "tokens_per_s": T / statistics.median(spent) * 1e3,
            "peak_bytes_of_rank_0": peak,
            "peak_bytes_alone": peak_alone,
            "loss": flat[0].item(),
            "loss_alone": flat_alone[0].item(),
            "gradient_difference": ((flat[1:] - flat_alone[1:]).norm() / flat_alone[1:].norm()).item(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        file = Path(options.out_dir) / "context_parallel.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        same = ("gpus", "seq_length", "recompute")
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        rows = [row for row in rows if any(row[name] != record[name] for name in same)]  # of earlier runs
        atomic_write(file, json.dumps({"environment": environment(), "rows": [*rows, record]}, indent=1).encode())
        print(
            f"{size} ranks, T = {T:,}: {record['speedup']:.2f} x one ({statistics.median(spent):.1f} against "
            f"{statistics.median(spent_alone):.1f} ms), peak {peak / 1e9:.2f} against {peak_alone / 1e9:.2f} GB, loss "
            f"{record['loss']:.5f} against {record['loss_alone']:.5f}, gradients differ by {record['gradient_difference']:.1e}"
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


def gradients(micro_batch: MicroBatch, ids: torch.Tensor, targets: torch.Tensor, part: float) -> torch.Tensor:
    """Add those of a stretch to the parameters; its part of the loss."""
    weight = torch.full((), part, device=ids.device)
    objective, loss = micro_batch.forward(ids, targets, weight, weight)
    micro_batch.backward(objective)
    return loss.detach()


def timed(state: TrainState, pass_of: Callable[[], torch.Tensor], device: str) -> tuple[list[float], int, torch.Tensor]:
    """Milliseconds of steps, peak bytes, and loss and gradients of the first step, unscaled."""
    times, first = [], torch.empty(0)
    state.model.train()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARMUP + MEASURED):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        flat = pass_of()
        if number == 0:
            scale = state.scaler.get_scale()
            first = torch.cat([flat[:1], flat[1:] / scale])
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.grad_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times[WARMUP:], torch.cuda.max_memory_allocated() if device == "cuda" else 0, first


if __name__ == "__main__":
    sys.exit(main())
