"""Triton kernel that adds up what programs contributed to the gradients of parameters, in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(parts, out, rows, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out_n = Σ_i parts_in of `parts` (rows, N), float32."""
    o, i = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + i
        total += tl.load(parts + row[:, None] * N + o[None, :], mask=(row < rows)[:, None] & (o < N)[None, :], other=0.0)
    tl.store(out + o, tl.sum(total, 0), mask=o < N)
