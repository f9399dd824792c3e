"""Triton kernels in front of the core: its operands from the input projection, and the projection's gradient from theirs.

Columns of the projection, (B, T, ·): x (D = H P), u (H R), v (H R), z (D), dt (H), hidden layer of the rank gate (N). The first
CONV = D + 2 H R of them pass a causal convolution. Heads of u and v are read as two halves of R/2 channels: a rotation turns
channel j of one with channel j of the other.
"""

import triton
import triton.language as tl

TAPS = tl.constexpr(4)  # of the convolution


@triton.jit
def _input_row(proj, past, t, T, stride, columns, mc, CONV: tl.constexpr, PAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The convolution's input at position t, float32: zero from T on, and before 0, but for the 3 rows of `past`."""
    row = tl.load(proj + t * stride + columns, mask=_if((t >= 0) & (t < T), mc), other=0.0).to(tl.float32)
    if PAST:
        early = _if((t < 0) & (t >= 1 - TAPS), mc)
        row += tl.load(past + (t + TAPS - 1) * CONV + columns, mask=early, other=0.0).to(tl.float32)
    return row


@triton.jit
def _rows_before(proj, past, t, T, stride, columns, mc, CONV: tl.constexpr, PAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The convolution's three inputs before position t, the oldest first."""
    oldest = _input_row(proj, past, t - 3, T, stride, columns, mc, CONV, PAST)
    older = _input_row(proj, past, t - 2, T, stride, columns, mc, CONV, PAST)
    return oldest, older, _input_row(proj, past, t - 1, T, stride, columns, mc, CONV, PAST)


@triton.jit
def _if(here, mc):  # type: ignore[no-untyped-def]
    """The mask `mc` where a number is true, else nothing; the interpreter takes no product of a number and a mask for one."""
    return tl.where(here, mc, mc != mc)


@triton.jit
def convolved(x3, x2, x1, x0, weight, bias, columns, mc, CONV):  # type: ignore[no-untyped-def]
    """bias + Σ_j weight_j of four rows of inputs, the oldest first: the convolution's output at the last one."""
    c = tl.load(bias + columns, mask=mc, other=0.0).to(tl.float32)
    c += x3 * tl.load(weight + columns, mask=mc, other=0.0).to(tl.float32)
    c += x2 * tl.load(weight + CONV + columns, mask=mc, other=0.0).to(tl.float32)
    c += x1 * tl.load(weight + 2 * CONV + columns, mask=mc, other=0.0).to(tl.float32)
    return c + x0 * tl.load(weight + 3 * CONV + columns, mask=mc, other=0.0).to(tl.float32)


@triton.jit
def _mean_of_head(x, R: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum over the channels of each head, divided by R, in all of the head's columns: (HEADS n) as given."""
    n: tl.constexpr = x.shape[0] // HEADS
    sums = tl.sum(tl.reshape(x, [HEADS, n]), 1) / R
    return tl.reshape(tl.broadcast_to(sums[:, None], [HEADS, n]), [HEADS * n])


@triton.jit
def put(p, o, m, value):  # type: ignore[no-untyped-def]
    tl.store(p + o, value.to(p.dtype.element_ty), mask=m)


@triton.jit
def get(p, o, m):  # type: ignore[no-untyped-def]
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, x, columns, begin, rows, b, T, L, stride, H: tl.constexpr, P: tl.constexpr,
    CONV: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Some columns of x."""
    mc = columns < H * P
    o = ((b * H + columns // P) * L + L - T) * P + columns % P
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    for i in range(rows):
        t = begin + i
        x0 = _input_row(proj, past, t, T, stride, columns, mc, CONV, PAST)
        c = convolved(x3, x2, x1, x0, weight, bias, columns, mc, CONV)
        put(x, o + t * P, _if(t < T, mc), c / (1.0 + tl.exp(-c)))
        x3, x2, x1 = x2, x1, x0


@triton.jit
def _heads(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, scale, gate, cos, sin, out, turned, first, past_rows, begin, rows, b, T, stride,
    eps: tl.constexpr, H: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, HB: tl.constexpr, CONV: tl.constexpr,
    PAST: tl.constexpr, WINDOWED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """u or v, whose columns begin at `first`: normalised and gated in `out`, and normalised, SCALED by γ and turned."""
    HALF: tl.constexpr = R // 2
    o_c = tl.arange(0, HEADS * HB)
    head, j = o_c // HB, o_c % HB
    mc = (head < H) & (j < HALF)
    left = first + head * R + j
    right = left + HALF
    if SCALED:
        scale1 = tl.load(scale + head * R + j, mask=mc, other=0.0)
        scale2 = tl.load(scale + head * R + HALF + j, mask=mc, other=0.0)
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, left, mc, CONV, PAST)
    y3, y2, y1 = _rows_before(proj, past, begin, T, stride, right, mc, CONV, PAST)
    for i in range(rows):
        t = begin + i
        m = _if(t < T, mc)
        x0 = _input_row(proj, past, t, T, stride, left, mc, CONV, PAST)
        y0 = _input_row(proj, past, t, T, stride, right, mc, CONV, PAST)
        o, o_g = (b * H + head) * T * R + t * R + j, (b * T + t) * R + j
        g1, g2 = get(gate, o_g, m), get(gate, o_g + HALF, m)
        if WINDOWED:
            b_cos = tl.load(cos + t * HALF + j, mask=m, other=0.0)
            b_sin = tl.load(sin + t * HALF + j, mask=m, other=0.0)
        n1 = convolved(x3, x2, x1, x0, weight, bias, left, mc, CONV)
        n2 = convolved(y3, y2, y1, y0, weight, bias, right, mc, CONV)
        r = tl.rsqrt(_mean_of_head(n1 * n1 + n2 * n2, R, HEADS) + eps)
        n1 *= r
        n2 *= r
        put(out, o, m, n1 * g1)
        put(out, o + HALF, m, n2 * g2)
        if WINDOWED:
            if SCALED:
                n1 *= scale1
                n2 *= scale2
            o = (b * H + head) * (T + past_rows) * R + (past_rows + t) * R + j
            put(turned, o, m, n1 * b_cos - n2 * b_sin)
            put(turned, o + HALF, m, n2 * b_cos + n1 * b_sin)
        x3, x2, x1 = x2, x1, x0
        y3, y2, y1 = y2, y1, y0


@triton.jit(do_not_specialize=["T", "L", "rows"])
def operands_kernel(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, q_scale, gate, cos, sin, u, v, q, k, x, T, L, rows, stride_b, stride: tl.constexpr,
    eps: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, HB: tl.constexpr,
    BC: tl.constexpr, PAST: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Part 0: u (gated) and q (rotated); 1: v and k; 2 and on: BC columns of x.

    A program takes `rows` positions in a row, and reads each row of inputs once: the convolution's last three pass through
    registers.
    """
    i_s, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    CONV: tl.constexpr = H * P + 2 * H * R
    begin = i_s.to(tl.int64) * rows
    proj += b * stride_b
    past += b * (TAPS - 1) * CONV
    if part == 0:
        _heads(
            proj, past, weight, bias, q_scale, gate, cos, sin, u, q, H * P, 0, begin, rows, b, T, stride, eps,
            H, R, HEADS, HB, CONV, PAST, WINDOWED, True,
        )  # fmt: skip
    elif part == 1:
        _heads(
            proj, past, weight, bias, q_scale, gate, cos, sin, v, k, H * P + H * R, L - T, begin, rows, b, T, stride, eps,
            H, R, HEADS, HB, CONV, PAST, WINDOWED, False,
        )  # fmt: skip
    else:
        columns = (part - 2) * BC + tl.arange(0, BC)
        _values(proj, past, weight, bias, x, columns, begin, rows, b, T, L, stride, H, P, CONV, PAST)


@triton.jit
def _values_backward(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, dx, columns, begin, rows, b, T, L, stride, H: tl.constexpr, P: tl.constexpr,
    CONV: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Over dx: the gradient of what silu was taken of, of some columns."""
    mc = columns < H * P
    o = ((b * H + columns // P) * L + L - T) * P + columns % P
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    for i in range(rows):
        t = begin + i
        m = _if(t < T, mc)
        x0 = _input_row(proj, past, t, T, stride, columns, mc, CONV, PAST)
        d = get(dx, o + t * P, m)
        c = convolved(x3, x2, x1, x0, weight, bias, columns, mc, CONV)
        s = 1.0 / (1.0 + tl.exp(-c))
        put(dx, o + t * P, m, d * s * (1.0 + c * (1.0 - s)))
        x3, x2, x1 = x2, x1, x0


@triton.jit
def _heads_backward(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, scale, gate, cos, sin, d, d_turned, d_gate, sums, first, past_rows, begin, rows, b, T, stride,
    eps: tl.constexpr, H: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, HB: tl.constexpr,
    CONV: tl.constexpr, PAST: tl.constexpr, WINDOWED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Over the gradient `d` of u or v: that of what the norm was taken of. `d_gate` (B, T, R): what they add to the gate's."""
    HALF: tl.constexpr = R // 2
    o_c, o_j = tl.arange(0, HEADS * HB), tl.arange(0, HB)
    head, j = o_c // HB, o_c % HB
    mc, mj = (head < H) & (j < HALF), o_j < HALF
    left = first + head * R + j
    right = left + HALF
    if SCALED:
        scale1 = tl.load(scale + head * R + j, mask=mc, other=0.0)
        scale2 = tl.load(scale + head * R + HALF + j, mask=mc, other=0.0)
        d_scale1 = tl.zeros([HEADS * HB], tl.float32)
        d_scale2 = tl.zeros([HEADS * HB], tl.float32)
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, left, mc, CONV, PAST)
    y3, y2, y1 = _rows_before(proj, past, begin, T, stride, right, mc, CONV, PAST)
    for i in range(rows):
        t = begin + i
        m, m_gate = _if(t < T, mc), _if(t < T, mj)
        x0 = _input_row(proj, past, t, T, stride, left, mc, CONV, PAST)
        y0 = _input_row(proj, past, t, T, stride, right, mc, CONV, PAST)
        o, o_g = (b * H + head) * T * R + t * R + j, (b * T + t) * R + j
        d1, d2 = get(d, o, m), get(d, o + HALF, m)
        g1, g2 = get(gate, o_g, m), get(gate, o_g + HALF, m)
        if WINDOWED:
            b_cos = tl.load(cos + t * HALF + j, mask=m, other=0.0)
            b_sin = tl.load(sin + t * HALF + j, mask=m, other=0.0)
            o_k = (b * H + head) * (T + past_rows) * R + (past_rows + t) * R + j
            e1, e2 = get(d_turned, o_k, m), get(d_turned, o_k + HALF, m)
        n1 = convolved(x3, x2, x1, x0, weight, bias, left, mc, CONV)
        n2 = convolved(y3, y2, y1, y0, weight, bias, right, mc, CONV)
        r = tl.rsqrt(_mean_of_head(n1 * n1 + n2 * n2, R, HEADS) + eps)
        n1 *= r
        n2 *= r
        p = d_gate + (b * T + t) * R + o_j
        tl.store(p, tl.sum(tl.reshape(d1 * n1, [HEADS, HB]), 0), mask=m_gate)
        tl.store(p + HALF, tl.sum(tl.reshape(d2 * n2, [HEADS, HB]), 0), mask=m_gate)
        d1 *= g1
        d2 *= g2
        if WINDOWED:
            f1, f2 = e1 * b_cos + e2 * b_sin, e2 * b_cos - e1 * b_sin
            if SCALED:
                d_scale1 += f1 * n1
                d_scale2 += f2 * n2
                f1 *= scale1
                f2 *= scale2
            d1 += f1
            d2 += f2
        mean = _mean_of_head(d1 * n1 + d2 * n2, R, HEADS)  # through n = c r, r = rsqrt(mean(c²) + eps)
        put(d, o, m, r * (d1 - n1 * mean))
        put(d, o + HALF, m, r * (d2 - n2 * mean))
        x3, x2, x1 = x2, x1, x0
        y3, y2, y1 = y2, y1, y0
    if SCALED:
        tl.store(sums + head * R + j, d_scale1, mask=mc)
        tl.store(sums + head * R + HALF + j, d_scale2, mask=mc)


@triton.jit(do_not_specialize=["T", "L", "rows"])
def operands_backward_kernel(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, q_scale, gate, cos, sin, du, dv, dq, dk, dx, d_gate_u, d_gate_v, sums, T, L, stride_b,
    stride: tl.constexpr, rows, eps: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
    HB: tl.constexpr, BC: tl.constexpr, PAST: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the convolution's outputs over `du` (part 0), `dv` (1) and BC columns of `dx` (2 and on).

    A program takes `rows` positions in a row. `sums` (B stretches, H R): what each adds to the gradient of q_scale.
    """
    i_s, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    CONV: tl.constexpr = H * P + 2 * H * R
    begin = i_s.to(tl.int64) * rows
    proj += b * stride_b
    past += b * (TAPS - 1) * CONV
    if part == 0:
        sums += (b * tl.num_programs(0) + i_s) * H * R
        _heads_backward(
            proj, past, weight, bias, q_scale, gate, cos, sin, du, dq, d_gate_u, sums, H * P, 0, begin, rows, b, T, stride,
            eps, H, R, HEADS, HB, CONV, PAST, WINDOWED, True,
        )  # fmt: skip
    elif part == 1:
        _heads_backward(
            proj, past, weight, bias, q_scale, gate, cos, sin, dv, dk, d_gate_v, sums, H * P + H * R, L - T, begin, rows, b,
            T, stride, eps, H, R, HEADS, HB, CONV, PAST, WINDOWED, False,
        )  # fmt: skip
    else:
        columns = (part - 2) * BC + tl.arange(0, BC)
        _values_backward(proj, past, weight, bias, dx, columns, begin, rows, b, T, L, stride, H, P, CONV, PAST)


@triton.jit
def _gradient_row(d, t, T, step, mc):  # type: ignore[no-untyped-def]
    """Row t of `step` numbers, from the columns' pointers `d`; zero outside of the T positions."""
    return tl.load(d + t * step, mask=_if((t >= 0) & (t < T), mc), other=0.0).to(tl.float32)


@triton.jit
def _conv_backward(  # type: ignore[no-untyped-def]
    d, step: tl.constexpr, proj, past, d_proj, d_past, weight, sums, columns, mc, begin, rows, b, T, stride, d_stride,
    CONV: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """For columns whose gradients begin at `d` and are `step` numbers apart from row to row; `rows` positions from `begin` on.

    Rows pass through registers, each read once: 4 rows of gradients, from t to t + 3, and of inputs, from t - 3 to t.
    """
    w0 = tl.load(weight + columns, mask=mc, other=0.0).to(tl.float32)
    w1 = tl.load(weight + CONV + columns, mask=mc, other=0.0).to(tl.float32)
    w2 = tl.load(weight + 2 * CONV + columns, mask=mc, other=0.0).to(tl.float32)
    w3 = tl.load(weight + 3 * CONV + columns, mask=mc, other=0.0).to(tl.float32)
    a0 = tl.zeros([columns.shape[0]], tl.float32)
    a1 = tl.zeros([columns.shape[0]], tl.float32)
    a2 = tl.zeros([columns.shape[0]], tl.float32)
    a3 = tl.zeros([columns.shape[0]], tl.float32)
    a4 = tl.zeros([columns.shape[0]], tl.float32)
    p3, p2, p1 = _rows_before(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    d0 = _gradient_row(d, begin, T, step, mc)
    d1 = _gradient_row(d, begin + 1, T, step, mc)
    d2 = _gradient_row(d, begin + 2, T, step, mc)
    for i in range(0, rows, 4):
        t = begin + i
        e0 = _gradient_row(d, t + 3, T, step, mc)  # of four rows at once, so that the next ones are on their way
        e1 = _gradient_row(d, t + 4, T, step, mc)
        e2 = _gradient_row(d, t + 5, T, step, mc)
        e3 = _gradient_row(d, t + 6, T, step, mc)
        q0 = _input_row(proj, past, t, T, stride, columns, mc, CONV, PAST)
        q1 = _input_row(proj, past, t + 1, T, stride, columns, mc, CONV, PAST)
        q2 = _input_row(proj, past, t + 2, T, stride, columns, mc, CONV, PAST)
        q3 = _input_row(proj, past, t + 3, T, stride, columns, mc, CONV, PAST)
        _put_row(d_proj, d_past, b, t, T, d_stride, columns, mc, d0 * w3 + d1 * w2 + d2 * w1 + e0 * w0, CONV, PAST)
        _put_row(d_proj, d_past, b, t + 1, T, d_stride, columns, mc, d1 * w3 + d2 * w2 + e0 * w1 + e1 * w0, CONV, PAST)
        _put_row(d_proj, d_past, b, t + 2, T, d_stride, columns, mc, d2 * w3 + e0 * w2 + e1 * w1 + e2 * w0, CONV, PAST)
        _put_row(d_proj, d_past, b, t + 3, T, d_stride, columns, mc, e0 * w3 + e1 * w2 + e2 * w1 + e3 * w0, CONV, PAST)
        a0 += d0 * p3 + d1 * p2 + d2 * p1 + e0 * q0
        a1 += d0 * p2 + d1 * p1 + d2 * q0 + e0 * q1
        a2 += d0 * p1 + d1 * q0 + d2 * q1 + e0 * q2
        a3 += d0 * q0 + d1 * q1 + d2 * q2 + e0 * q3
        a4 += d0 + d1 + d2 + e0
        p3, p2, p1 = q1, q2, q3
        d0, d1, d2 = e1, e2, e3
    sums += columns
    tl.store(sums, a0, mask=mc)
    tl.store(sums + CONV, a1, mask=mc)
    tl.store(sums + 2 * CONV, a2, mask=mc)
    tl.store(sums + 3 * CONV, a3, mask=mc)
    tl.store(sums + 4 * CONV, a4, mask=mc)


@triton.jit(do_not_specialize=["T", "L", "rows"])
def conv_backward_kernel(  # type: ignore[no-untyped-def]
    du, dv, dx, proj, past, d_proj, d_past, weight, sums, T, L, rows, stride_b, stride: tl.constexpr, d_stride_b,
    d_stride: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """From the gradients of its output, d input_t = Σ_j weight_j d_{t+3-j}, for BC columns and `rows` positions in a row.

    `sums` (programs, 5 CONV): what they add to the gradients of the taps and of the bias. Columns run over x, then u and v,
    each padded to whole blocks.
    """
    i_s, i_c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    CONV: tl.constexpr = H * P + 2 * H * R
    NX: tl.constexpr = (H * P + BC - 1) // BC
    NU: tl.constexpr = (H * R + BC - 1) // BC
    o = tl.arange(0, BC)
    begin = i_s.to(tl.int64) * rows
    if PAST:
        begin -= TAPS - 1
    proj += b * stride_b
    past += b * (TAPS - 1) * CONV
    d_proj += b * d_stride_b
    sums += (b * tl.num_programs(0) + i_s) * (TAPS + 1) * CONV
    if i_c < NX:
        inside = i_c * BC + o
        d = dx + ((b * H + inside // P) * L + L - T) * P + inside % P
        _conv_backward(
            d, P, proj, past, d_proj, d_past, weight, sums, inside, inside < H * P, begin, rows, b, T, stride,
            d_stride, CONV, PAST,
        )  # fmt: skip
    else:
        inside = ((i_c - NX) % NU) * BC + o
        columns = H * P + inside + (0 if i_c < NX + NU else H * R)
        d = (du if i_c < NX + NU else dv) + (b * H + inside // R) * T * R + inside % R
        _conv_backward(
            d, R, proj, past, d_proj, d_past, weight, sums, columns, inside < H * R, begin, rows, b, T, stride,
            d_stride, CONV, PAST,
        )  # fmt: skip


@triton.jit
def _put_row(  # type: ignore[no-untyped-def]
    d_proj, d_past, b, t, T, stride, columns, mc, value, CONV: tl.constexpr, PAST: tl.constexpr
):  # fmt: skip
    """Writes the gradient of the convolution's input at position t, of the rows before 0 into `d_past`."""
    put(d_proj, t * stride + columns, _if((t >= 0) & (t < T), mc), value)
    if PAST:
        early = _if((t < 0) & (t >= 1 - TAPS), mc)
        put(d_past, (b * (TAPS - 1) + t + TAPS - 1) * CONV + columns, early, value)
