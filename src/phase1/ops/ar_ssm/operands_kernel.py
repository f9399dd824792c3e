"""Triton kernels in front of the core: its operands from the input projection, and the projection's gradient from theirs.

Columns of the projection, (B, T, ·): x (D = H P), u (H R), v (H R), z (D), dt (H), hidden layer of the rank gate (N). The first
CONV = D + 2 H R of them pass a causal convolution. Heads of u and v are read as two halves of R/2 channels: a rotation turns
channel j of one with channel j of the other.
"""

import triton
import triton.language as tl

from phase1.ops.elementwise import sigmoid

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
def taps_of(weight, bias, columns, mc, CONV):  # type: ignore[no-untyped-def]
    """The convolution's four weights of each column, that of the oldest input first, and its bias."""
    w0 = tl.load(weight + columns, mask=mc, other=0.0).to(tl.float32)
    w1 = tl.load(weight + CONV + columns, mask=mc, other=0.0).to(tl.float32)
    w2 = tl.load(weight + 2 * CONV + columns, mask=mc, other=0.0).to(tl.float32)
    w3 = tl.load(weight + 3 * CONV + columns, mask=mc, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, tl.load(bias + columns, mask=mc, other=0.0).to(tl.float32)


@triton.jit
def convolved(x3, x2, x1, x0, w0, w1, w2, w3, c):  # type: ignore[no-untyped-def]
    """c + Σ_j w_j of four rows of inputs, the oldest first: the convolution's output at the last one."""
    return c + x3 * w0 + x2 * w1 + x1 * w2 + x0 * w3


@triton.jit
def _spread(d, p3, p2, p1, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """The gradient of the input three positions ago, of which `d` is the last part, and what those of the three after it have.

    Carried are sums that differ: of rows of `d` that start as zeros and are handed on Triton, 3.6 to 3.9, makes one, silently.
    """
    return p3 + d * w0, p2 + d * w1, p1 + d * w2, d * w3


@triton.jit
def _sums_with(own, x3, x2, x1, x0, a0, a1, a2, a3, a4):  # type: ignore[no-untyped-def]
    """The gradients of the taps, the oldest first, and of the bias, with those that the output's gradient `own` adds."""
    return a0 + own * x3, a1 + own * x2, a2 + own * x1, a3 + own * x0, a4 + own


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
def _row_of_heads(  # type: ignore[no-untyped-def]
    proj, past, gate, cos, sin, t, b, T, stride, left, right, j, mc, R: tl.constexpr, CONV: tl.constexpr,
    PAST: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """What u and v at position t are made of, in two halves: inputs of the convolution, the gate, cos and sin of the angle."""
    m = _if((t >= 0) & (t < T), mc)
    x = _input_row(proj, past, t, T, stride, left, mc, CONV, PAST)
    y = _input_row(proj, past, t, T, stride, right, mc, CONV, PAST)
    o = (b * T + t) * R + j
    g1, g2 = get(gate, o, m), get(gate, o + R // 2, m)
    if WINDOWED:
        return x, y, g1, g2, get(cos, t * (R // 2) + j, m), get(sin, t * (R // 2) + j, m)
    return x, y, g1, g2, g1, g2


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, x, columns, begin, rows, b, T, L, stride, H: tl.constexpr, P: tl.constexpr,
    CONV: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Some columns of x."""
    mc = columns < H * P
    o = ((b * H + columns // P) * L + L - T) * P + columns % P
    w0, w1, w2, w3, c0 = taps_of(weight, bias, columns, mc, CONV)
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    x0 = _input_row(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    for i in range(rows):
        t = begin + i
        x_next = _input_row(proj, past, t + 1, T, stride, columns, mc, CONV, PAST)  # on its way while this one is used
        c = convolved(x3, x2, x1, x0, w0, w1, w2, w3, c0)
        put(x, o + t * P, _if(t < T, mc), c * sigmoid(c))
        x3, x2, x1, x0 = x2, x1, x0, x_next


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
    v0, v1, v2, v3, c1 = taps_of(weight, bias, left, mc, CONV)
    w0, w1, w2, w3, c2 = taps_of(weight, bias, right, mc, CONV)
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, left, mc, CONV, PAST)
    y3, y2, y1 = _rows_before(proj, past, begin, T, stride, right, mc, CONV, PAST)
    x0, y0, g1, g2, b_cos, b_sin = _row_of_heads(
        proj, past, gate, cos, sin, begin, b, T, stride, left, right, j, mc, R, CONV, PAST, WINDOWED
    )
    for i in range(rows):
        t = begin + i
        m = _if(t < T, mc)
        x, y, g1_next, g2_next, cos_next, sin_next = _row_of_heads(
            proj, past, gate, cos, sin, t + 1, b, T, stride, left, right, j, mc, R, CONV, PAST, WINDOWED
        )
        o = (b * H + head) * T * R + t * R + j
        n1 = convolved(x3, x2, x1, x0, v0, v1, v2, v3, c1)
        n2 = convolved(y3, y2, y1, y0, w0, w1, w2, w3, c2)
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
        x3, x2, x1, x0 = x2, x1, x0, x
        y3, y2, y1, y0 = y2, y1, y0, y
        g1, g2, b_cos, b_sin = g1_next, g2_next, cos_next, sin_next


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
def _put_row(  # type: ignore[no-untyped-def]
    d_proj, d_past, b, t, T, stride, columns, mc, value, CONV: tl.constexpr, PAST: tl.constexpr
):  # fmt: skip
    """Writes the gradient of the convolution's input at position t, of the rows before 0 into `d_past`."""
    put(d_proj, t * stride + columns, _if((t >= 0) & (t < T), mc), value)
    if PAST:
        early = _if((t < 0) & (t >= 1 - TAPS), mc)
        put(d_past, (b * (TAPS - 1) + t + TAPS - 1) * CONV + columns, early, value)


@triton.jit
def _put_sums(sums, columns, mc, a0, a1, a2, a3, a4, CONV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes what a program adds to the gradients of the taps, the oldest first, and of the bias."""
    tl.store(sums + columns, a0, mask=mc)
    tl.store(sums + CONV + columns, a1, mask=mc)
    tl.store(sums + 2 * CONV + columns, a2, mask=mc)
    tl.store(sums + 3 * CONV + columns, a3, mask=mc)
    tl.store(sums + 4 * CONV + columns, a4, mask=mc)


@triton.jit
def _values_backward(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, dx, d_proj, d_past, sums, columns, begin, rows, b, T, L, stride, d_stride, H: tl.constexpr,
    P: tl.constexpr, CONV: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Some columns of x. Row t of inputs has its gradient once that of the convolution's output at t + 3 is there."""
    mc = columns < H * P
    o = ((b * H + columns // P) * L + L - T) * P + columns % P
    w0, w1, w2, w3, c0 = taps_of(weight, bias, columns, mc, CONV)
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    nothing = tl.zeros([columns.shape[0]], tl.float32)
    p3, p2, p1 = nothing, nothing, nothing
    a0, a1, a2, a3, a4 = nothing, nothing, nothing, nothing, nothing
    x0 = _input_row(proj, past, begin, T, stride, columns, mc, CONV, PAST)
    d = get(dx, o + begin * P, _if((begin >= 0) & (begin < T), mc))
    for i in range(rows + TAPS - 1):
        t = begin + i
        x = _input_row(proj, past, t + 1, T, stride, columns, mc, CONV, PAST)  # of the next round: on its way meanwhile
        d_next = get(dx, o + (t + 1) * P, _if((t >= -1) & (t + 1 < T), mc))
        c = convolved(x3, x2, x1, x0, w0, w1, w2, w3, c0)
        s = sigmoid(c)
        d *= s * (1.0 + c * (1.0 - s))
        own = tl.where(i < rows, d, 0.0)
        a0, a1, a2, a3, a4 = _sums_with(own, x3, x2, x1, x0, a0, a1, a2, a3, a4)
        value, p3, p2, p1 = _spread(d, p3, p2, p1, w0, w1, w2, w3)
        _put_row(d_proj, d_past, b, t - (TAPS - 1), T, d_stride, columns, _if(i >= TAPS - 1, mc), value, CONV, PAST)
        x3, x2, x1, x0, d = x2, x1, x0, x, d_next
    _put_sums(sums, columns, mc, a0, a1, a2, a3, a4, CONV)


@triton.jit
def _row_of_gradients(  # type: ignore[no-untyped-def]
    d, d_turned, t, b, T, past_rows, head, j, mc, H: tl.constexpr, R: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """The gradients of u or v at position t, and of the query or key, in two halves."""
    m = _if((t >= 0) & (t < T), mc)
    o = (b * H + head) * T * R + t * R + j
    d1, d2 = get(d, o, m), get(d, o + R // 2, m)
    if WINDOWED:
        o = (b * H + head) * (T + past_rows) * R + (past_rows + t) * R + j
        return d1, d2, get(d_turned, o, m), get(d_turned, o + R // 2, m)
    return d1, d2, d1, d2


@triton.jit
def _heads_backward(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, scale, gate, cos, sin, d, d_turned, d_gate, d_proj, d_past, scale_sums, sums, first, past_rows,
    begin, rows, b, T, stride, d_stride, eps: tl.constexpr, H: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr,
    HB: tl.constexpr, CONV: tl.constexpr, PAST: tl.constexpr, WINDOWED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """u or v, as `_values_backward`; `d` is the gradient of u or v. `d_gate` (B, T, R): what they add to the gate's."""
    HALF: tl.constexpr = R // 2
    o_c, o_j = tl.arange(0, HEADS * HB), tl.arange(0, HB)
    head, j = o_c // HB, o_c % HB
    mc, mj = (head < H) & (j < HALF), o_j < HALF
    left = first + head * R + j
    right = left + HALF
    nothing = tl.zeros([HEADS * HB], tl.float32)
    if SCALED:
        scale1 = tl.load(scale + head * R + j, mask=mc, other=0.0)
        scale2 = tl.load(scale + head * R + HALF + j, mask=mc, other=0.0)
        d_scale1, d_scale2 = nothing, nothing
    v0, v1, v2, v3, c1 = taps_of(weight, bias, left, mc, CONV)
    w0, w1, w2, w3, c2 = taps_of(weight, bias, right, mc, CONV)
    x3, x2, x1 = _rows_before(proj, past, begin, T, stride, left, mc, CONV, PAST)
    y3, y2, y1 = _rows_before(proj, past, begin, T, stride, right, mc, CONV, PAST)
    p3, p2, p1, q3, q2, q1 = nothing, nothing, nothing, nothing, nothing, nothing
    a0, a1, a2, a3, a4 = nothing, nothing, nothing, nothing, nothing
    b0, b1, b2, b3, b4 = nothing, nothing, nothing, nothing, nothing
    x0, y0, g1, g2, b_cos, b_sin = _row_of_heads(
        proj, past, gate, cos, sin, begin, b, T, stride, left, right, j, mc, R, CONV, PAST, WINDOWED
    )
    d0, e0, turned1, turned2 = _row_of_gradients(d, d_turned, begin, b, T, past_rows, head, j, mc, H, R, WINDOWED)
    for i in range(rows + TAPS - 1):
        t = begin + i
        m_gate = _if((t >= 0) & (t < T) & (i < rows), mj)
        x, y, g1_next, g2_next, cos_next, sin_next = _row_of_heads(
            proj, past, gate, cos, sin, t + 1, b, T, stride, left, right, j, mc, R, CONV, PAST, WINDOWED
        )
        d_next, e_next, turned1_next, turned2_next = _row_of_gradients(
            d, d_turned, t + 1, b, T, past_rows, head, j, mc, H, R, WINDOWED
        )
        n1 = convolved(x3, x2, x1, x0, v0, v1, v2, v3, c1)
        n2 = convolved(y3, y2, y1, y0, w0, w1, w2, w3, c2)
        r = tl.rsqrt(_mean_of_head(n1 * n1 + n2 * n2, R, HEADS) + eps)
        n1 *= r
        n2 *= r
        p = d_gate + (b * T + t) * R + o_j
        tl.store(p, tl.sum(tl.reshape(d0 * n1, [HEADS, HB]), 0), mask=m_gate)
        tl.store(p + HALF, tl.sum(tl.reshape(e0 * n2, [HEADS, HB]), 0), mask=m_gate)
        d0 *= g1
        e0 *= g2
        if WINDOWED:
            f1, f2 = turned1 * b_cos + turned2 * b_sin, turned2 * b_cos - turned1 * b_sin
            if SCALED:
                d_scale1 += tl.where(i < rows, f1 * n1, 0.0)
                d_scale2 += tl.where(i < rows, f2 * n2, 0.0)
                f1 *= scale1
                f2 *= scale2
            d0 += f1
            e0 += f2
        mean = _mean_of_head(d0 * n1 + e0 * n2, R, HEADS)  # through n = c r, r = rsqrt(mean(c²) + eps)
        d0 = r * (d0 - n1 * mean)
        e0 = r * (e0 - n2 * mean)
        own = tl.where(i < rows, d0, 0.0)
        a0, a1, a2, a3, a4 = _sums_with(own, x3, x2, x1, x0, a0, a1, a2, a3, a4)
        own = tl.where(i < rows, e0, 0.0)
        b0, b1, b2, b3, b4 = _sums_with(own, y3, y2, y1, y0, b0, b1, b2, b3, b4)
        at, there = t - (TAPS - 1), _if(i >= TAPS - 1, mc)
        value, p3, p2, p1 = _spread(d0, p3, p2, p1, v0, v1, v2, v3)
        _put_row(d_proj, d_past, b, at, T, d_stride, left, there, value, CONV, PAST)
        value, q3, q2, q1 = _spread(e0, q3, q2, q1, w0, w1, w2, w3)
        _put_row(d_proj, d_past, b, at, T, d_stride, right, there, value, CONV, PAST)
        x3, x2, x1, x0 = x2, x1, x0, x
        y3, y2, y1, y0 = y2, y1, y0, y
        g1, g2, b_cos, b_sin = g1_next, g2_next, cos_next, sin_next
        d0, e0, turned1, turned2 = d_next, e_next, turned1_next, turned2_next
    _put_sums(sums, left, mc, a0, a1, a2, a3, a4, CONV)
    _put_sums(sums, right, mc, b0, b1, b2, b3, b4, CONV)
    if SCALED:
        tl.store(scale_sums + head * R + j, d_scale1, mask=mc)
        tl.store(scale_sums + head * R + HALF + j, d_scale2, mask=mc)


@triton.jit(do_not_specialize=["T", "L", "rows"])
def operands_backward_kernel(  # type: ignore[no-untyped-def]
    proj, past, weight, bias, q_scale, gate, cos, sin, du, dv, dq, dk, dx, d_gate_u, d_gate_v, d_proj, d_past, scale_sums, sums,
    T, L, stride_b, stride: tl.constexpr, d_stride_b, d_stride: tl.constexpr, rows, eps: tl.constexpr, H: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, HB: tl.constexpr, BC: tl.constexpr, PAST: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """The gradient of the projection's columns of u (part 0), v (1) and BC of x (2 and on), through the convolution.

    d input_t = Σ_j weight_j d output_{t+3-j}: a program takes `rows` positions in a row, and works out the gradients of the
    outputs at the three after them too, which are another program's. It reads each row of inputs and of gradients once: they
    pass through registers. `scale_sums` (B stretches, H R) and `sums` (B stretches, 5 CONV): what each program adds to the
    gradient of q_scale, and to those of the taps and the bias.
    """
    i_s, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    CONV: tl.constexpr = H * P + 2 * H * R
    begin = i_s.to(tl.int64) * rows
    if PAST:
        begin -= TAPS - 1
    proj += b * stride_b
    past += b * (TAPS - 1) * CONV
    d_proj += b * d_stride_b
    sums += (b * tl.num_programs(0) + i_s) * (TAPS + 1) * CONV
    if part == 0:
        scale_sums += (b * tl.num_programs(0) + i_s) * H * R
        _heads_backward(
            proj, past, weight, bias, q_scale, gate, cos, sin, du, dq, d_gate_u, d_proj, d_past, scale_sums, sums, H * P, 0,
            begin, rows, b, T, stride, d_stride, eps, H, R, HEADS, HB, CONV, PAST, WINDOWED, True,
        )  # fmt: skip
    elif part == 1:
        _heads_backward(
            proj, past, weight, bias, q_scale, gate, cos, sin, dv, dk, d_gate_v, d_proj, d_past, scale_sums, sums,
            H * P + H * R, L - T, begin, rows, b, T, stride, d_stride, eps, H, R, HEADS, HB, CONV, PAST, WINDOWED, False,
        )  # fmt: skip
    else:
        columns = (part - 2) * BC + tl.arange(0, BC)
        _values_backward(
            proj, past, weight, bias, dx, d_proj, d_past, sums, columns, begin, rows, b, T, L, stride, d_stride, H, P, CONV,
            PAST,
        )  # fmt: skip
