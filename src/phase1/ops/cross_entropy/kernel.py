"""`softmax_rows` as a Triton kernel: logits are read twice and written once, and nothing else is made."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time


@triton.jit
def _softmax_rows(  # type: ignore[no-untyped-def]
    logits,
    stride,
    bias,
    column,
    picked,
    weights,
    log_odds,
    V,
    BIASED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ODDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    wide = picked.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    # every lane keeps the maximum of what it saw and the sum of exponentials relative to it; they are joined at the end
    highest = tl.full([BLOCK], -1e30, wide)
    total = tl.zeros([BLOCK], wide)
    for start in range(0, V, BLOCK):
        j = start + lanes
        z = tl.load(logits + j, mask=j < V, other=-1e30).to(wide)
        if BIASED:
            z += tl.load(bias + j, mask=j < V, other=0.0)
        higher = tl.maximum(highest, z)
        total = total * tl.exp(highest - higher) + tl.exp(z - higher)
        highest = higher
    peak = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - peak), 0)
    target = tl.load(column + row)
    chosen = tl.load(logits + target).to(wide)
    if BIASED:
        chosen += tl.load(bias + target)
    chosen = chosen - peak - tl.log(total)
    tl.store(picked + row, chosen)
    if GRADIENT:
        weight = tl.load(weights + row).to(wide)
        if ODDS:
            weight /= 1.0 + tl.exp(tl.load(log_odds + row).to(wide) - chosen)
        for start in range(0, V, BLOCK):
            j = start + lanes
            z = tl.load(logits + j, mask=j < V, other=-1e30).to(wide)
            if BIASED:
                z += tl.load(bias + j, mask=j < V, other=0.0)
            d = tl.exp(z - peak) / total - (j == target).to(wide)
            tl.store(logits + j, (weight * d).to(logits.dtype.element_ty), mask=j < V)


def softmax_rows_kernel(
    logits: Tensor,
    bias: Tensor | None,
    column: Tensor,
    picked: Tensor,
    weights: Tensor | None,
    log_odds: Tensor | None = None,
) -> None:
    """`softmax_rows`, one program a row, in the precision of `picked`."""
    parts = (column, picked, *(part for part in (bias, weights, log_odds) if part is not None))
    assert logits.stride(1) == 1 and all(part.is_contiguous() for part in parts)
    n, V = logits.shape
    if n:
        flags = {"BIASED": bias is not None, "GRADIENT": weights is not None, "ODDS": log_odds is not None, "BLOCK": BLOCK}
        _softmax_rows[(n,)](logits, logits.stride(0), bias, column, picked, weights, log_odds, V, **flags, num_warps=8)
