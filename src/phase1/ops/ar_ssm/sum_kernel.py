"""Triton kernel that adds up what programs contributed to the gradients of parameters, in a fixed order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 32  # of one program


@triton.jit
def _add_up(parts, rows, width, out, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out_n = Σ_i parts_in of one block of columns of `parts` (rows, width); nothing for blocks past the last or below 0."""
    o, i = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    inside = (o >= 0) & (o < width)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, tl.where((block >= 0) & (block * COLUMNS < width), rows, 0), ROWS):
        row = first + i
        total += tl.load(parts + row[:, None] * width + o[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    tl.store(out + o, tl.sum(total, 0), mask=inside)


SIZES = [name + str(i) for i in range(5) for name in ("rows", "width")]


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(  # type: ignore[no-untyped-def]
    out, parts0, rows0, width0, parts1, rows1, width1, parts2, rows2, width2, parts3, rows3, width3, parts4, rows4, width4,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of five matrices over their rows, one after the other in `out`, float32."""
    block = tl.program_id(0)
    _add_up(parts0, rows0, width0, out, block, ROWS, COLUMNS)
    block -= tl.cdiv(width0, COLUMNS)
    out += width0
    _add_up(parts1, rows1, width1, out, block, ROWS, COLUMNS)
    block -= tl.cdiv(width1, COLUMNS)
    out += width1
    _add_up(parts2, rows2, width2, out, block, ROWS, COLUMNS)
    block -= tl.cdiv(width2, COLUMNS)
    out += width2
    _add_up(parts3, rows3, width3, out, block, ROWS, COLUMNS)
    block -= tl.cdiv(width3, COLUMNS)
    out += width3
    _add_up(parts4, rows4, width4, out, block, ROWS, COLUMNS)


def sums_of_rows(five: tuple[Tensor, ...]) -> Tensor:
    """Five float32 matrices summed over their rows, one after the other in one vector."""
    widths = [parts.shape[1] for parts in five]
    out = torch.empty(sum(widths), dtype=torch.float32, device=five[0].device)
    given: list[Any] = [number for parts in five for number in (parts, *parts.shape)]
    programs = sum(triton.cdiv(width, COLUMNS) for width in widths)
    sum_kernel[(programs,)](out, *given, ROWS=128, COLUMNS=COLUMNS, num_warps=4)
    return out
