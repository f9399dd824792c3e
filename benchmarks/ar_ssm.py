"""Time of every kernel of the fused AR-SSM operator, forward and backward, at several shapes: python benchmarks/ar_ssm.py

Needs a GPU; the operator is checked against float64 first. Writes ar_ssm.json into --out-dir.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from phase1.machine.environment import current_command, environment
from phase1.ops.ar_ssm import fused_ar_ssm, self_check

SHAPES = ((64, 512), (4, 8192), (1, 131072))
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out-dir", default="results/benchmarks")
    options = parser.parse_args()
    device, rows = torch.device("cuda"), []
    for R in options.ranks:
        error = self_check.worst_error(device, R, options.head_dim, 8, options.window, torch.float16)
        for B, T in SHAPES:
            kernels = times(B, T, R, options.head_dim, options.window, device)
            total = sum(kernels.values())
            rows.append({"rank": R, "batch_size": B, "seq_length": T, "worst_error": error, "microseconds": kernels})
            per_token = 1e3 * total / (B * T)
            print(f"R {R}, {B} x {T}: {total:.0f} µs, {per_token:.2f} ns a token, error {error:.1e}", flush=True)
    settings = {name: value for name, value in vars(options).items() if name != "out_dir"}
    facts = {"environment": environment(), "command": current_command(), "options": settings, "rows": rows}
    file = Path(options.out_dir) / "ar_ssm.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")


def times(B: int, T: int, R: int, P: int, window: int, device: torch.device) -> dict[str, float]:
    """Microseconds of each kernel of one forward and backward pass in FP16."""
    proj, p = self_check.operands(B, T, 8, R, P, 64, 8, torch.float16, device)
    weights = torch.randn(B, T, 8 * P, device=device, dtype=torch.float16)

    def step() -> None:
        out, _, _ = fused_ar_ssm(proj, p, window=window, memory=1000.0)
        torch.autograd.grad(out, [proj, *p], weights)

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


if __name__ == "__main__":
    main()
