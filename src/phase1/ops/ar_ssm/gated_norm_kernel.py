"""Triton kernels behind the core: weight ⊙ rms(y ⊙ silu(z)) over all channels, and back."""

import triton
import triton.language as tl

from phase1.ops.elementwise import sigmoid


@triton.jit
def _gated(y, z, row, m, i_b, i_t, stride_b, stride: tl.constexpr, o, mo, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """y, z and sigmoid(z), float32."""
    mask = m[:, None] & mo[None, :]
    b_y = tl.load(y + row[:, None] * D + o[None, :], mask=mask, other=0.0).to(tl.float32)
    b_z = tl.load(z + (i_b * stride_b + i_t * stride)[:, None] + o[None, :], mask=mask, other=0.0).to(tl.float32)
    return b_y, b_z, sigmoid(b_z)


@triton.jit(do_not_specialize=["n", "T"])
def gated_norm_kernel(  # type: ignore[no-untyped-def]
    y, z, weight, out, n, T, stride_b, stride: tl.constexpr, eps: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out = weight ⊙ g rsqrt(mean(g²) + eps), g = y silu(z), for ROWS of the n = B T rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m, o = row < n, tl.arange(0, DB)
    mo = o < D
    b_y, b_z, s = _gated(y, z, row, m, row // T, row % T, stride_b, stride, o, mo, D)
    g = b_y * b_z * s
    g *= tl.rsqrt(tl.sum(g * g, 1) / D + eps)[:, None]
    g *= tl.load(weight + o, mask=mo, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * D + o[None, :], g.to(out.dtype.element_ty), mask=m[:, None] & mo[None, :])


@triton.jit(do_not_specialize=["n", "T"])
def gated_norm_backward_kernel(  # type: ignore[no-untyped-def]
    y, z, weight, d_out, dy, dz, d_weight, n, T, stride_b, stride: tl.constexpr, d_stride_b, d_stride: tl.constexpr,
    eps: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dy, dz, and what each program's rows add to the weight's gradient, `d_weight` (programs, D)."""
    o = tl.arange(0, DB)
    mo = o < D
    b_weight = tl.load(weight + o, mask=mo, other=0.0).to(tl.float32)
    total = tl.zeros([DB], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + first
        m = row < n
        mask = m[:, None] & mo[None, :]
        i_b, i_t = row // T, row % T
        b_y, b_z, s = _gated(y, z, row, m, i_b, i_t, stride_b, stride, o, mo, D)
        g = b_y * b_z * s
        r = tl.rsqrt(tl.sum(g * g, 1) / D + eps)[:, None]
        normed = g * r
        d = tl.load(d_out + row[:, None] * D + o[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(d * normed, 0)
        d *= b_weight[None, :]
        d = r * (d - normed * (tl.sum(d * normed, 1) / D)[:, None])
        tl.store(dy + row[:, None] * D + o[None, :], (d * b_z * s).to(dy.dtype.element_ty), mask=mask)
        d = d * b_y * s * (1.0 + b_z * (1.0 - s))
        tl.store(dz + (i_b * d_stride_b + i_t * d_stride)[:, None] + o[None, :], d.to(dz.dtype.element_ty), mask=mask)
    tl.store(d_weight + tl.program_id(0) * D + o, total, mask=mo)
