"""Anchored tables as Triton kernels: a program owns rows in both directions, so nothing is added atomically.

Forward a kernel for each stretch of rows. Backward levels come last first: a row is visited once, when the gradients of
all its users are whole.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase1.ops.anchored_table.inverse import CHUNK

TILE = 2048  # numbers of a program that writes rows
SUMMED = 4096  # numbers of a program that adds up users
POSITIONS = ["n", "begin", "end", "first", "inner"]


@triton.jit(do_not_specialize=POSITIONS)
def _rows(  # type: ignore[no-untyped-def]
    own, stride, width, weights, anchors, table, begin, n,
    D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The n rows from `begin` on: their own part and the sum of their K anchors, in float32."""
    i, o_d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, PART)
    real, there = i < n, (o_d < D)[None, :]
    at = own + i[:, None] * stride + o_d[None, :]
    sums = tl.load(at, mask=real[:, None] & (o_d < width)[None, :], other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        a = tl.load(anchors + i * K + j, mask=real, other=0)
        w = tl.load(weights + i * K + j, mask=real, other=0.0).to(tl.float32)
        e = tl.load(table + a[:, None] * D + o_d[None, :], mask=real[:, None] & there, other=0.0)
        sums += w[:, None] * e.to(tl.float32)
    to = table + (begin + i)[:, None] * D + o_d[None, :]
    tl.store(to, sums.to(table.dtype.element_ty), mask=real[:, None] & there)


@triton.jit
def _weighed(  # type: ignore[no-untyped-def]
    d_table, d_inner, weights, indices, p, last, o_d, first, inner, D: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr
):
    """Gradients of the rows that are the users at `p`, times their weights, (u, d)."""
    valid = p < last
    place = tl.load(indices + p, mask=valid, other=0)
    w = tl.load(weights + place, mask=valid, other=0.0).to(tl.float32)
    user = place // K
    row = tl.where(user < inner, d_inner + user * D, d_table + (first + user) * D)  # of the last level: as they came
    row = tl.multiple_of(row, ALIGN)  # bytes: Triton does not see it through the choice
    d = tl.load(row[:, None] + o_d[None, :], mask=valid[:, None] & (o_d < D)[None, :], other=0.0)
    return w[:, None] * d.to(tl.float32)


@triton.jit(do_not_specialize=POSITIONS)
def _chunk_sums(  # type: ignore[no-untyped-def]
    d_table, d_inner, weights, indices, offsets, chunk_offsets, chunk_rows, sums, begin, end, first, inner,
    D: tl.constexpr, K: tl.constexpr, U: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The sum over a whole chunk of users, if it belongs to one of the rows from `begin` to `end`."""
    s, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, PART)
    row = tl.load(chunk_rows + s)
    if (row >= begin) & (row < end):
        p = tl.load(offsets + row) + (s - tl.load(chunk_offsets + row)) * CHUNK
        total = tl.zeros([U, PART], tl.float32)
        for i in range(0, CHUNK, U):
            at = p + i + tl.arange(0, U)
            total += _weighed(d_table, d_inner, weights, indices, at, p + CHUNK, o_d, first, inner, D, K, ALIGN)
        tl.store(sums + s * D + o_d, tl.sum(total, 0), mask=o_d < D)


@triton.jit(do_not_specialize=POSITIONS)
def _gradients_of_rows(  # type: ignore[no-untyped-def]
    d_table, d_inner, weights, indices, offsets, chunk_offsets, sums, d_own, width, begin, first, inner,
    D: tl.constexpr, K: tl.constexpr, U: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Of one row: its own, and what its users bring, whole chunks first."""
    i, o_d, o_u = tl.program_id(0).to(tl.int64), tl.arange(0, PART), tl.arange(0, U)
    row = begin + i
    s, last_s = tl.load(chunk_offsets + row), tl.load(chunk_offsets + row + 1)
    p, last_p = tl.load(offsets + row) + (last_s - s) * CHUNK, tl.load(offsets + row + 1)
    there = o_d < D
    total = tl.zeros([U, PART], tl.float32)
    for j in range(s, last_s, U):
        at = (j + o_u)[:, None]
        total += tl.load(sums + at * D + o_d[None, :], mask=(at < last_s) & there[None, :], other=0.0)
    for j in range(p, last_p, U):
        total += _weighed(d_table, d_inner, weights, indices, j + o_u, last_p, o_d, first, inner, D, K, ALIGN)
    d = tl.sum(total, 0) + tl.load(d_table + row * D + o_d, mask=there, other=0.0).to(tl.float32)
    tl.store(d_own + i * width + o_d, d.to(d_own.dtype.element_ty), mask=o_d < width)
    if row >= first:
        tl.store(d_inner + (row - first) * D + o_d, d.to(d_inner.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=POSITIONS)
def _gradients_of_weights(  # type: ignore[no-untyped-def]
    d_rows, table, anchors, d_weights, n, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PART: tl.constexpr
):
    """Products of n rows' gradients with their anchors."""
    i, o_d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, PART)
    real = i < n
    inside = real[:, None] & (o_d < D)[None, :]
    d = tl.load(d_rows + i[:, None] * D + o_d[None, :], mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        a = tl.load(anchors + i * K + j, mask=real, other=0)
        e = tl.load(table + a[:, None] * D + o_d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(d_weights + i * K + j, tl.sum(e * d, 1).to(d_weights.dtype.element_ty), mask=real)


def _parts(own: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Where each part begins and ends, and the part, without those of no rows."""
    for (begin, end), part in zip(pairwise(accumulate(map(len, own), initial=0)), own, strict=True):
        if end > begin:
            yield begin, end, part


def _tile(D: int, numbers: int) -> tuple[int, int]:
    """Rows and columns of a tile of whole rows and about so many `numbers`."""
    columns = triton.next_power_of_2(D)
    return max(1, numbers // columns), columns


def table(
    own: Sequence[Tensor], weights: Tensor, anchors: Tensor, levels: Sequence[int], dtype: torch.dtype, zeros: int = 0
) -> Tensor:
    """`levels.table` in a kernel for each part."""
    D, K, first = own[0].shape[1], anchors.shape[1], levels[0]
    table = torch.empty(levels[-1] + zeros, D, dtype=dtype, device=own[0].device)
    table[levels[-1] :].zero_()
    weights, anchors, (R, columns) = weights.contiguous(), anchors.contiguous(), _tile(D, TILE)
    for begin, end, part in _parts(own):
        part = part if part.stride(1) == 1 else part.contiguous()
        of = slice(max(0, begin - first), max(0, end - first))
        size = {"D": D, "K": K if begin >= first else 0, "R": R, "PART": columns}
        inputs = (part, part.stride(0), part.shape[1], weights[of], anchors[of], table)
        _rows[(triton.cdiv(end - begin, R),)](*inputs, begin, end - begin, **size, num_warps=4)
    return table


def gradients(
    d_table: Tensor, table: Tensor, own: Sequence[Tensor], weights: Tensor, anchors: Tensor, inverse: Sequence[Tensor],
    levels: Sequence[int],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """`levels.gradients` in two kernels a level, and two for the weights; repeats to the bit."""
    V, D, K, first, last = levels[-1], table.shape[1], anchors.shape[1], levels[0], [0, *levels][-2]
    d_table, weights, anchors, inner = d_table.contiguous(), weights.contiguous(), anchors.contiguous(), max(0, last - first)
    indices, offsets, chunk_offsets, chunk_rows = inverse
    d_inner = d_table.new_empty(inner, D)
    sums = d_table.new_empty(len(chunk_rows), D, dtype=torch.float32)
    d_own = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in own]
    d_weights = torch.empty_like(weights)
    (U, columns), (R, _) = _tile(D, SUMMED), _tile(D, TILE)
    align = math.gcd(16, D * d_table.element_size(), d_table.data_ptr())
    summing = {"D": D, "K": K, "U": min(U, CHUNK), "PART": columns, "CHUNK": CHUNK, "ALIGN": align, "num_warps": 4}
    inputs = (d_table, d_inner, weights, indices, offsets, chunk_offsets)
    for begin, end in reversed(list(pairwise([0, *levels][:-1]))):
        if len(chunk_rows):
            _chunk_sums[(len(chunk_rows),)](*inputs, chunk_rows, sums, begin, end, first, inner, **summing)
        for at, until, d_part in _parts(d_own):
            if begin <= at < end:
                arguments = (*inputs, sums, d_part, d_part.shape[1], at, first, inner)
                _gradients_of_rows[(until - at,)](*arguments, **summing)
    for d_rows, of in ((d_inner, slice(0, inner)), (d_table[last:V], slice(inner, V - first))):
        if n := len(d_rows) if K else 0:
            size = {"D": D, "K": K, "R": R, "PART": columns, "num_warps": 4}
            _gradients_of_weights[(triton.cdiv(n, R),)](d_rows, table, anchors[of], d_weights[of], n, **size)
    return d_own, d_weights
