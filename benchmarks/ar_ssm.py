"""Time of every kernel of the fused AR-SSM operator, forward and backward, at several shapes, and of a whole mixer layer.

    python benchmarks/ar_ssm.py

The core is the semiseparable part with its window; the layer has both projections too, and is replayed as a CUDA graph. Needs a
GPU; the operator is checked against float64 first. Writes ar_ssm.json into --out-dir.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from phase1.layers.ar_ssm import ARSSM
from phase1.machine.environment import current_command, environment
from phase1.ops.ar_ssm import fused_ar_ssm, self_check
from phase1.ops.compile_together import compile_together

SHAPES = ((64, 512), (4, 8192), (1, 131072))
REPEATS, GRAPH_REPEATS = 5, 20
WHAT = (
    "FP16, H 8, P {head_dim}, window {window}; kernels by the profiler, mean of {repeats}; core: the semiseparable part with "
    "its window; layer: with both projections, as a CUDA graph, median of {graphs}; error against float64"
)
CORE = ("state_kernel", "carry_kernel", "forward_kernel", "far_backward", "near_backward")
HEADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out-dir", default="results/benchmarks")
    options = parser.parse_args()
    device, rows = torch.device("cuda"), []
    for R in options.ranks:
        check = partial(self_check.worst_error, device, R, options.head_dim, 8, options.window, torch.float16)
        compile_together(partial(all_at_once, check, R, options.head_dim, options.window, device))
        error = check()
        for B, T in SHAPES:
            kernels = times(B, T, R, options.head_dim, options.window, device)
            total = sum(kernels.values())
            core = sum(spent for name, spent in kernels.items() if name.startswith(CORE))
            row = {"rank": R, "batch_size": B, "seq_length": T, "worst_error": error, "total_us": total, "core_us": core}
            row |= {"core_ns_per_token": 1e3 * core / (B * T), "layer_ms": layer_ms(B, T, R, options.head_dim, options.window)}
            rows.append(row | {"microseconds": kernels})
            print(
                f"R {R}, {B} x {T}: kernels {total:.0f} µs, core {core:.0f} µs, {row['core_ns_per_token']:.2f} ns a token, "
                f"layer {row['layer_ms']:.3f} ms, error {error:.1e}",
                flush=True,
            )
    settings = {name: value for name, value in vars(options).items() if name != "out_dir"}
    what = WHAT.format(**settings, repeats=REPEATS, graphs=GRAPH_REPEATS)
    facts = {"environment": environment(), "command": current_command(), "what": what, "options": settings, "rows": rows}
    file = Path(options.out_dir) / "ar_ssm.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")


def all_at_once(check: Callable[[], float], *sizes: Any) -> None:
    """Launch every kernel that will run."""
    check()
    for B, T in SHAPES:
        training_step(B, T, *sizes)()


def training_step(
    B: int, T: int, R: int, P: int, window: int, device: torch.device, generator: torch.Generator | None = None
) -> Callable[[], list[Tensor]]:
    """One forward and backward pass in FP16: its result and all gradients."""
    proj, p = self_check.operands(B, T, HEADS, R, P, 64, 8, torch.float16, device, generator)
    weights = torch.randn(B, T, HEADS * P, device=device, dtype=torch.float16, generator=generator)

    def step() -> list[Tensor]:
        out, _, _ = fused_ar_ssm(proj, p, window=window, memory=1000.0)
        return [out, *torch.autograd.grad(out, [proj, *p], weights)]

    return step


def times(B: int, T: int, R: int, P: int, window: int, device: torch.device) -> dict[str, float]:
    """Microseconds of each of its kernels."""
    step = training_step(B, T, R, P, window, device)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.split("(")[0][:60]
            kernels[name] = kernels.get(name, 0.0) + event.device_time / REPEATS
    return kernels


def layer_ms(B: int, T: int, R: int, P: int, window: int) -> float:
    """Milliseconds of a mixer layer with its projections, forward and backward in FP16 autocast, as a CUDA graph."""
    torch.manual_seed(0)
    layer = ARSSM(HEADS * P, HEADS, R, min(8, R), window, 512).cuda()
    h = torch.randn(B, T, HEADS * P, device="cuda", dtype=torch.float16).requires_grad_()
    weights = torch.randn_like(h)
    leaves = [h, *layer.parameters()]

    def step() -> None:
        with torch.autocast("cuda", torch.float16, cache_enabled=False):
            out = layer(h)[0]
        torch.autograd.grad(out, leaves, weights, allow_unused=True)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    spent = []
    for _ in range(GRAPH_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)


if __name__ == "__main__":
    main()
