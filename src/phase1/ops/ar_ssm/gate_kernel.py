"""Triton kernels of what is small per token: the rank gate, dt and the log decay, and their gradients.

The rank gate is g = sigmoid(W relu(hidden + b) + c), and 1 for the first FIXED ranks; dt = softplus(raw + dt_bias) and
log_a = -exp(A_log) dt - forget. `hidden` and `raw` are columns of the input projection, see `operands_kernel`.
"""

import triton
import triton.language as tl

from phase1.ops.elementwise import sigmoid, softplus


@triton.jit
def _hidden(proj, t, m, stride, gate_bias, o_n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """relu(hidden + b): [rows, N]."""
    mn = o_n < N
    b = tl.load(gate_bias + o_n, mask=mn, other=0.0).to(tl.float32)
    h = tl.load(proj + t[:, None] * stride + o_n[None, :], mask=m[:, None] & mn[None, :], other=0.0)
    return tl.where(m[:, None], tl.maximum(h.to(tl.float32) + b[None, :], 0.0), 0.0)


@triton.jit
def _hidden_columns(proj, t, m, stride, gate_bias, o_n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same transposed: [N, rows]."""
    mn = o_n < N
    b = tl.load(gate_bias + o_n, mask=mn, other=0.0).to(tl.float32)
    h = tl.load(proj + t[None, :] * stride + o_n[:, None], mask=m[None, :] & mn[:, None], other=0.0)
    return tl.where(m[None, :], tl.maximum(h.to(tl.float32) + b[:, None], 0.0), 0.0)


@triton.jit(do_not_specialize=["n", "T"])
def gate_kernel(  # type: ignore[no-untyped-def]
    proj, dt_bias, A_log, gate_bias, gate_weight, gate_out, gate, dt, log_a, n, T, stride_b, stride: tl.constexpr,
    forget: tl.constexpr, H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, FIXED: tl.constexpr, FIRST: tl.constexpr,
    HEADS: tl.constexpr, RB: tl.constexpr, NB: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """gate (B, T, R), dt and log_a (B, H, T) of BT of the n = B T tokens. From column FIRST of `proj` on: raw, then hidden."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m, b, t = row < n, row // T, row % T
    o_h, o_r, o_n = tl.arange(0, HEADS), tl.arange(0, RB), tl.arange(0, NB)
    mh, mr = o_h < H, o_r < R
    place = b * stride_b + t * stride + FIRST
    mask = m[:, None] & mh[None, :]
    raw = tl.load(proj + place[:, None] + o_h[None, :], mask=mask, other=0.0).to(tl.float32)
    step = softplus(raw + tl.load(dt_bias + o_h, mask=mh, other=0.0)[None, :])
    o = (b[:, None] * H + o_h[None, :]) * T + t[:, None]
    tl.store(dt + o, step, mask=mask)
    tl.store(log_a + o, -tl.exp(tl.load(A_log + o_h, mask=mh, other=0.0))[None, :] * step - forget, mask=mask)
    g = tl.full([BT, RB], 1.0, tl.float32)
    if N > 0:
        hidden = _hidden(proj, place + H, m, 1, gate_bias, o_n, N).to(proj.dtype.element_ty)
        free = mr & (o_r >= FIXED)
        W = gate_weight + (o_r - FIXED)[None, :] * N + o_n[:, None]
        b_W = tl.load(W, mask=free[None, :] & (o_n < N)[:, None], other=0.0)
        logit = tl.dot(hidden, b_W.to(hidden.dtype), input_precision="ieee")
        logit += tl.load(gate_out + o_r - FIXED, mask=free, other=0.0).to(tl.float32)[None, :]
        g = tl.where(free[None, :], sigmoid(logit), 1.0)
    tl.store(gate + row[:, None] * R + o_r[None, :], g.to(gate.dtype.element_ty), mask=m[:, None] & mr[None, :])


@triton.jit(do_not_specialize=["n", "T", "share"])
def gate_backward_kernel(  # type: ignore[no-untyped-def]
    proj, dt_bias, A_log, gate_bias, gate_weight, gate, d_dt, d_log_a, d_u, d_v, d_mean, share, d_proj, sums, n, T,
    stride_b, stride: tl.constexpr, d_stride_b, d_stride: tl.constexpr, H: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    FIXED: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr, RB: tl.constexpr, NB: tl.constexpr, BT: tl.constexpr,
    TOTAL: tl.constexpr, MEAN_USED: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw and hidden columns, and of the parameters.

    The gate's gradient is d_u + d_v, by the ranks of u and of v, (B, T, R) each; if MEAN_USED + share d_mean, that of the
    gate's mean over 1 / share numbers. `sums` (programs, TOTAL): what each program adds to the gradients of dt_bias (H),
    A_log (H), W (N R, transposed and with the fixed ranks), c (R) and b (N).
    """
    o_h, o_r, o_n, o_t = tl.arange(0, HEADS), tl.arange(0, RB), tl.arange(0, NB), tl.arange(0, BT).to(tl.int64)
    mh, mr, mn = o_h < H, o_r < R, o_n < N
    free = mr & (o_r >= FIXED)
    rate = -tl.exp(tl.load(A_log + o_h, mask=mh, other=0.0))[None, :]
    bias = tl.load(dt_bias + o_h, mask=mh, other=0.0)[None, :]
    d_bias = tl.zeros([BT, HEADS], tl.float32)
    d_A = tl.zeros([BT, HEADS], tl.float32)
    if N > 0:
        dW = tl.zeros([NB, RB], tl.float32)
        dc = tl.zeros([BT, RB], tl.float32)
        db = tl.zeros([BT, NB], tl.float32)
        W = gate_weight + (o_r - FIXED)[:, None] * N + o_n[None, :]
        b_W = tl.load(W, mask=free[:, None] & mn[None, :], other=0.0).to(proj.dtype.element_ty)
    for first in range(tl.program_id(0) * BT, n, tl.num_programs(0) * BT):
        row = o_t + first
        m, b, t = row < n, row // T, row % T
        place, d_place = b * stride_b + t * stride + FIRST, b * d_stride_b + t * d_stride + FIRST
        mask = m[:, None] & mh[None, :]
        raw = tl.load(proj + place[:, None] + o_h[None, :], mask=mask, other=0.0).to(tl.float32) + bias
        o = (b[:, None] * H + o_h[None, :]) * T + t[:, None]
        b_log_a = tl.load(d_log_a + o, mask=mask, other=0.0)
        d_raw = (tl.load(d_dt + o, mask=mask, other=0.0) + b_log_a * rate) * sigmoid(raw)
        tl.store(d_proj + d_place[:, None] + o_h[None, :], d_raw.to(d_proj.dtype.element_ty), mask=mask)
        d_bias += d_raw
        d_A += b_log_a * rate * softplus(raw)
        if N > 0:
            o = row[:, None] * R + o_r[None, :]
            mask = m[:, None] & mr[None, :]
            d = tl.load(d_u + o, mask=mask, other=0.0).to(tl.float32) + tl.load(d_v + o, mask=mask, other=0.0).to(tl.float32)
            if MEAN_USED:
                d += tl.load(d_mean) * share
            g = tl.load(gate + o, mask=mask, other=0.0).to(tl.float32)
            d = tl.where(m[:, None] & free[None, :], d * g * (1.0 - g), 0.0)
            dc += d
            rounded = d.to(proj.dtype.element_ty)
            hiddenT = _hidden_columns(proj, place + H, m, 1, gate_bias, o_n, N)
            dW = tl.dot(hiddenT.to(rounded.dtype), rounded, dW, input_precision="ieee")
            hidden = _hidden(proj, place + H, m, 1, gate_bias, o_n, N)
            d_hidden = tl.where(hidden > 0, tl.dot(rounded, b_W, input_precision="ieee"), 0.0)
            db += d_hidden
            p = d_proj + d_place[:, None] + H + o_n[None, :]
            tl.store(p, d_hidden.to(d_proj.dtype.element_ty), mask=m[:, None] & mn[None, :])
    sums += tl.program_id(0) * TOTAL
    tl.store(sums + o_h, tl.sum(d_bias, 0), mask=mh)
    tl.store(sums + H + o_h, tl.sum(d_A, 0), mask=mh)
    if N > 0:
        sums += 2 * H
        tl.store(sums + o_n[:, None] * R + o_r[None, :], dW, mask=mn[:, None] & mr[None, :])
        tl.store(sums + N * R + o_r, tl.sum(dc, 0), mask=mr)
        tl.store(sums + (N + 1) * R + o_n, tl.sum(db, 0), mask=mn)
