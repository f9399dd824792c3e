"""`softmax_rows` as a Triton kernel: logits are read twice and written once, and nothing else is made."""

import triton
import triton.language as tl
from torch import Tensor

from phase1.ops.elementwise import LN2, LOG2E, sigmoid

BLOCK = 4096  # columns at a time: 16 bytes a thread
STEPS = 4  # blocks whose maximum is taken before any exponential: 5 exponentials for 4 numbers instead of 8
WARPS = 16  # rows in flight, two a multiprocessor, stay in the second level cache until they are read again


@triton.jit
def _load(logits, bias, j, V, wide: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns j of a row."""
    if MASKED:
        z = tl.load(logits + j, mask=j < V, other=-1e30).to(wide)
        if BIASED:
            z += tl.load(bias + j, mask=j < V, other=0.0)
    else:
        z = tl.load(logits + j).to(wide)
        if BIASED:
            z += tl.load(bias + j)
    return z


@triton.jit
def _gradient(logits, z, j, target, peak, scale, weight, V, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """weight (softmax - one-hot) with scale = weight / sum of exponentials, written over the logits."""
    d = scale * tl.exp2(z * LOG2E - peak) - tl.where(j == target, weight, 0.0)
    if MASKED:
        tl.store(logits + j, d.to(logits.dtype.element_ty), mask=j < V)
    else:
        tl.store(logits + j, d.to(logits.dtype.element_ty))


@triton.jit(do_not_specialize=["V"])
def _softmax_rows(  # type: ignore[no-untyped-def]
    logits,
    stride,
    bias,
    targets,
    log_p,
    weights,
    log_odds,
    V,
    BIASED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ODDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    wide = log_p.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    # every lane keeps the maximum of what it saw, to the base 2, and the sum of exponentials relative to it; at the end they
    # are joined
    highest = tl.full([BLOCK], -1e30, wide)
    total = tl.zeros([BLOCK], wide)
    whole = V // (BLOCK * STEPS) * (BLOCK * STEPS)  # columns that need no mask
    for start in range(0, whole, BLOCK * STEPS):
        z0 = _load(logits, bias, start + lanes, V, wide, BIASED, False)
        largest = z0
        for step in tl.static_range(1, STEPS):
            largest = tl.maximum(largest, _load(logits, bias, start + step * BLOCK + lanes, V, wide, BIASED, False))
        higher = tl.maximum(highest, largest * LOG2E)
        total = total * tl.exp2(highest - higher) + tl.exp2(z0 * LOG2E - higher)
        for step in tl.static_range(1, STEPS):  # the loads above once more: the compiler keeps what they have loaded
            z = _load(logits, bias, start + step * BLOCK + lanes, V, wide, BIASED, False)
            total += tl.exp2(z * LOG2E - higher)
        highest = higher
    for start in range(whole, V, BLOCK):
        z = _load(logits, bias, start + lanes, V, wide, BIASED, True)
        higher = tl.maximum(highest, z * LOG2E)
        total = total * tl.exp2(highest - higher) + tl.exp2(z * LOG2E - higher)
        highest = higher
    peak = tl.max(highest, 0)
    total = tl.sum(total * tl.exp2(highest - peak), 0)
    target = tl.load(targets + row)
    chosen = tl.load(logits + target).to(wide)
    if BIASED:
        chosen += tl.load(bias + target)
    chosen = (chosen * LOG2E - peak - tl.log2(total)) * LN2
    tl.store(log_p + row, chosen)
    if GRADIENT:
        weight = tl.load(weights + row).to(wide)
        if ODDS:
            weight *= sigmoid(chosen - tl.load(log_odds + row).to(wide))
        scale = weight / total
        for start in range(0, whole, BLOCK):
            j = start + lanes
            z = _load(logits, bias, j, V, wide, BIASED, False)
            _gradient(logits, z, j, target, peak, scale, weight, V, False)
        for start in range(whole, V, BLOCK):
            j = start + lanes
            z = _load(logits, bias, j, V, wide, BIASED, True)
            _gradient(logits, z, j, target, peak, scale, weight, V, True)


def softmax_rows_kernel(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_log_prob: Tensor,
    weights: Tensor | None,
    log_odds: Tensor | None = None,
) -> None:
    """`softmax_rows`, one program a row, in the precision of `target_log_prob`."""
    parts = (target, target_log_prob, *(part for part in (bias, weights, log_odds) if part is not None))
    assert logits.stride(1) == 1 and all(part.is_contiguous() for part in parts)
    n, V = logits.shape
    if n:
        flags = {"BIASED": bias is not None, "GRADIENT": weights is not None, "ODDS": log_odds is not None}
        sizes = {"BLOCK": BLOCK, "STEPS": STEPS, "num_warps": WARPS}
        _softmax_rows[(n,)](logits, logits.stride(0), bias, target, target_log_prob, weights, log_odds, V, **flags, **sizes)
