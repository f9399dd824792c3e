"""The loss inside groups as Triton kernels: a program owns a group, so nothing is added atomically.

Products are 16 or 32 rows high and nothing is transposed (ops/pointer/kernel.py says why): gradients of rows have rows in rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, SLOTS = 16, 32  # rows of a tile
DEPTH = 64  # of the states at a time in a product
PART = 128  # of the states that a program of the backward pass writes
SIZES = ["n", "size"]


@triton.jit
def _states(h, stride, t, o_d, valid, D):  # type: ignore[no-untyped-def]
    """Coordinates o_d of the tokens t, (t, d)."""
    return tl.load(h + t[:, None] * stride + o_d[None, :], mask=valid[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _by_tokens(h, stride, t, valid, E, row, real, D: tl.constexpr, DEPTH: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr):  # type: ignore[no-untyped-def]
    """h · E, tokens in rows."""
    z = tl.zeros([BT, BS], tl.float32)
    for d0 in range(0, D, DEPTH):
        o_d = d0 + tl.arange(0, DEPTH)
        h_t = _states(h, stride, t, o_d, valid, D)
        e = tl.load(E + row[None, :] * D + o_d[:, None], mask=real[None, :] & (o_d < D)[:, None], other=0.0).to(h_t.dtype)
        z = tl.dot(h_t, e, z, input_precision="ieee")
    return z


@triton.jit(do_not_specialize=SIZES)
def _forward(  # type: ignore[no-untyped-def]
    h, stride, E, bias, targets, order, starts, nll, normalizer, n, size,
    D: tl.constexpr, DEPTH: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + g), tl.load(starts + g + 1)
    o_t, o_s = tl.arange(0, BT), tl.arange(0, BS)
    row = g * size + o_s
    real = (o_s < size) & (row < n)
    b = tl.load(bias + row, mask=real, other=0.0)
    for i in range(first, last, BT):
        valid = i + o_t < last
        t = tl.load(order + i + o_t, mask=valid, other=0)
        z = _by_tokens(h, stride, t, valid, E, row, real, D, DEPTH, BT, BS)
        z = tl.where(real[None, :], z + b[None, :], float("-inf"))
        top = tl.max(z, 1)
        sums = top + tl.log(tl.sum(tl.exp(z - top[:, None]), 1))
        target = tl.load(targets + t, mask=valid, other=0)
        z_target = tl.sum(tl.where(row[None, :] == target[:, None], z, 0.0), 1)
        tl.store(nll + t, sums - z_target, mask=valid)
        tl.store(normalizer + t, sums, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _gradients_of_states(  # type: ignore[no-untyped-def]
    h, stride, E, bias, targets, order, starts, normalizer, d_nll, d_h, n, size,
    D: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """PART coordinates of the states of a group's tokens."""
    g = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + g), tl.load(starts + g + 1)
    o_t, o_s = tl.arange(0, BT), tl.arange(0, BS)
    o_d = tl.program_id(1) * PART + tl.arange(0, PART)
    row = g * size + o_s
    real = (o_s < size) & (row < n)
    b = tl.load(bias + row, mask=real, other=0.0)
    for i in range(first, last, BT):
        valid = i + o_t < last
        t = tl.load(order + i + o_t, mask=valid, other=0)
        z = _by_tokens(h, stride, t, valid, E, row, real, D, DEPTH, BT, BS)
        sums = tl.load(normalizer + t, mask=valid, other=0.0)
        target = tl.load(targets + t, mask=valid, other=-1)
        d_z = tl.where(real[None, :] & valid[:, None], tl.exp(z + b[None, :] - sums[:, None]), 0.0)
        d_z -= tl.where(row[None, :] == target[:, None], 1.0, 0.0)
        e = tl.load(E + row[:, None] * D + o_d[None, :], mask=real[:, None] & (o_d < D)[None, :], other=0.0).to(
            d_h.dtype.element_ty
        )
        # weighed last: half precision sees numbers of order 1, whatever the scale of the loss
        w = tl.load(d_nll + t, mask=valid, other=0.0)
        d = tl.dot(d_z.to(e.dtype), e, input_precision="ieee") * w[:, None]
        tl.store(d_h + t[:, None] * D + o_d[None, :], d.to(d_h.dtype.element_ty), mask=valid[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _gradients_of_rows(  # type: ignore[no-untyped-def]
    h, stride, E, bias, targets, order, starts, normalizer, d_nll, d_E, d_bias, n, size,
    D: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """BS rows of a group, PART coordinates of each; zeros where the group has no token."""
    g = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + g), tl.load(starts + g + 1)
    o_t = tl.arange(0, BT)
    slot = tl.program_id(1) * BS + tl.arange(0, BS)
    o_d = tl.program_id(2) * PART + tl.arange(0, PART)
    row = g * size + slot
    real = (slot < size) & (row < n)
    b = tl.load(bias + row, mask=real, other=0.0)
    sums_E, sums_b = tl.zeros([BS, PART], tl.float32), tl.zeros([BS], tl.float32)
    for i in range(first, last, BT):
        valid = i + o_t < last
        t = tl.load(order + i + o_t, mask=valid, other=0)
        z = tl.zeros([BS, BT], tl.float32)
        for d0 in range(0, D, DEPTH):
            o_z = d0 + tl.arange(0, DEPTH)
            h_z = tl.load(h + t[None, :] * stride + o_z[:, None], mask=valid[None, :] & (o_z < D)[:, None], other=0.0)
            e = tl.load(E + row[:, None] * D + o_z[None, :], mask=real[:, None] & (o_z < D)[None, :], other=0.0)
            z = tl.dot(e.to(h_z.dtype), h_z, z, input_precision="ieee")
        sums = tl.load(normalizer + t, mask=valid, other=0.0)
        target = tl.load(targets + t, mask=valid, other=-1)
        d_z = tl.where(real[:, None] & valid[None, :], tl.exp(z + b[:, None] - sums[None, :]), 0.0)
        d_z -= tl.where(row[:, None] == target[None, :], 1.0, 0.0)
        w = tl.load(d_nll + t, mask=valid, other=0.0)
        sums_b += tl.sum(d_z * w[None, :], 1)
        largest = tl.max(tl.abs(w), 0)  # half precision sees weights of order 1
        d_z *= (w / tl.where(largest == 0.0, 1.0, largest))[None, :]
        h_t = _states(h, stride, t, o_d, valid, D)
        sums_E += largest * tl.dot(d_z.to(h_t.dtype), h_t, input_precision="ieee")
    tl.store(d_E + row[:, None] * D + o_d[None, :], sums_E.to(d_E.dtype.element_ty), mask=real[:, None] & (o_d < D)[None, :])
    if tl.program_id(2) == 0:
        tl.store(d_bias + row, sums_b, mask=real)


def _operands(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor | int, ...]:
    states = states if states.stride(1) == 1 else states.contiguous()
    return states, states.stride(0), rows.contiguous(), bias.contiguous(), targets.contiguous()


def losses(
    states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, order: Tensor, starts: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """`gathered.losses` in one kernel."""
    nll, normalizer = (torch.zeros(len(states), dtype=torch.float32, device=states.device) for _ in range(2))
    tile = {"D": states.shape[1], "DEPTH": DEPTH, "BT": TOKENS, "BS": max(16, triton.next_power_of_2(size))}
    operands = _operands(states, rows, bias, targets)
    _forward[(len(starts) - 1,)](*operands, order, starts, nll, normalizer, len(rows), size, **tile, num_warps=4)
    return nll, normalizer


def gradients(
    states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, order: Tensor, starts: Tensor, normalizer: Tensor,
    d_nll: Tensor, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`gathered.gradients` in two kernels; repeats to the bit."""
    d_states = torch.zeros_like(states, memory_format=torch.contiguous_format)  # most tokens are in no group
    d_rows, d_bias = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (rows, bias))
    D, groups = states.shape[1], len(starts) - 1
    tile = {"D": D, "DEPTH": DEPTH, "PART": PART, "BT": TOKENS, "num_warps": 4, "num_stages": 2}
    inputs = (*_operands(states, rows, bias, targets), order, starts, normalizer, d_nll.contiguous())
    parts = triton.cdiv(D, PART)
    slots = max(16, triton.next_power_of_2(size))
    _gradients_of_states[(groups, parts)](*inputs, d_states, len(rows), size, **tile, BS=slots)
    blocks = triton.cdiv(size, SLOTS)
    _gradients_of_rows[(groups, blocks, parts)](*inputs, d_rows, d_bias, len(rows), size, **tile, BS=SLOTS)
    return d_states, d_rows, d_bias
