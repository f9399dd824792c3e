"""Compile every kernel that the operators launch for a card of the capability in argv, without one; print its shared memory.

Not in Triton's interpreter, which the tests' own process has. Each line: kernel, bytes, sizes.
"""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from phase1.ops.anchored_table import anchored_table, inverse_index
from phase1.ops.anchored_table import op as table_op
from phase1.ops.ar_ssm import ar_ssm_step, fused_ar_ssm, self_check
from phase1.ops.cross_entropy.kernel import softmax_rows_kernel
from phase1.ops.group_nll import group_nll
from phase1.ops.group_nll import op as group_op
from phase1.ops.pointer import op as pointer_op
from phase1.ops.pointer import pointer_log_probability

HALF, SINGLE = torch.float16, torch.float32


class Card:
    """Stands in for the driver of a GPU: kernels are compiled for it, and nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled(sizes: str):
    """What `kernel[grid]` is in place of a launch."""

    def launcher(kernel: JITFunction, grid: object):
        def launch(*arguments: object, **options: object) -> None:
            made = kernel.warmup(*arguments, grid=grid, **options)
            print(kernel.__name__, made.metadata.shared, sizes, flush=True)

        return launch

    return launcher


def ar_ssm(R: int, P: int, dtype: torch.dtype) -> None:
    proj, p = self_check.operands(1, 200, 2, R, P, 64, 8, dtype, torch.device("cpu"))
    out, state, gate = fused_ar_ssm(proj, p, window=64, memory=500.0)
    torch.autograd.grad(out.sum() + gate + state.S.sum(), [proj])
    step(R, P, dtype)


def step(R: int, P: int, dtype: torch.dtype) -> None:
    proj, p = self_check.operands(1, 1, 2, R, P, 64, 8 if R > 8 else 0, dtype, torch.device("cpu"))
    for position in (100, 2**40, torch.tensor(100)):
        ar_ssm_step(proj, p, window=64, memory=500.0, state=self_check.state_of(proj, p, 63, position))


def others(dtype: torch.dtype) -> None:
    from phase1.ops.anchored_table import kernel as table
    from phase1.ops.group_nll import kernel as groups
    from phase1.ops.pointer import kernel as pointer

    pointer_op._form, group_op._form, table_op._form = lambda q: pointer, lambda states, size: groups, lambda weights, dtype: table
    q, k = (torch.zeros(1, 300, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    bias, ids = torch.zeros(1, 300, requires_grad=True), torch.zeros(1, 300, dtype=torch.int64)
    pointer_log_probability(q, k, bias, ids, ids, window=128, past=0).sum().backward()
    states, rows = (torch.zeros(n, 512, dtype=dtype, requires_grad=True) for n in (300, 670))
    group_nll(states, rows, torch.zeros(670, requires_grad=True), torch.zeros(300, dtype=torch.int64), 67).sum().backward()
    own = [torch.zeros(n, width, requires_grad=True) for n, width in ((64, 512), (64, 96), (512, 512))]
    weights, anchors, levels = torch.zeros(576, 6, requires_grad=True), torch.zeros(576, 6, dtype=torch.int64), [64, 128, 640]
    anchored_table(own, weights, anchors, levels, inverse_index(anchors, levels), dtype).sum().backward()
    logits, target = torch.zeros(4, 50257, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    softmax_rows_kernel(logits, torch.zeros(50257), target, torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.zeros(4))


CASES = {
    "R 32, P 64, FP16": lambda: ar_ssm(32, 64, HALF),
    "R 128, P 128, FP16": lambda: ar_ssm(128, 128, HALF),
    "R 128, P 128, FP32": lambda: ar_ssm(128, 128, SINGLE),
    "other operators, FP16": lambda: others(HALF),
}

if __name__ == "__main__":
    driver.set_active(Card(int(sys.argv[1])))
    for name in sys.argv[2:] or CASES:
        JITFunction.__getitem__ = compiled(name)
        CASES[name]()
