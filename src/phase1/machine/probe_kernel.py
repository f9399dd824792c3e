"""The smallest Triton kernel that shows that compiler, driver and GPU work together; imported where Triton is."""

import torch
import triton
import triton.language as tl


@triton.jit
def _double_kernel(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, N)
    tl.store(y + offsets, 2 * tl.load(x + offsets))


def doubles() -> bool:
    """Whether the kernel doubles 64 numbers."""
    x = torch.arange(64.0, device="cuda")
    y = torch.empty_like(x)
    _double_kernel[(1,)](x, y, 64)
    return torch.equal(y, 2 * x)
