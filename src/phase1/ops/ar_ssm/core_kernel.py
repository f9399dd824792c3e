"""Triton kernels of the mixer's core: semiseparable part and window, forward and every gradient.

Rows: `u`, `v`, `q` (B, H, T, R), `k` (B, H, L, R) and `x` (B, H, L, P) with L = past + T: `past` rows of the window come before
the first position. `dt` and `log_a` (B, H, T) are float32; `y` and its gradient are (B, T, H, P). Positions are cut into NS
stretches of NC chunks of C positions. Stretches run beside each other: `states` holds S before each of them, and the final one.

Names in kernels: o_ = offsets, m = mask, b_ = a block's values; a trailing T is a block loaded transposed. No block is ever
transposed in registers (`tl.trans`): on Hopper, Triton 3.4 to 3.7.0 compiles products of such blocks wrongly without a word.

What a program does per chunk is bound by the number of its instructions, so a block is addressed by one 64-bit pointer to its
first row and 32-bit offsets that are the same in every chunk, and log decays are to the base 2, as `exp2` is one instruction.
"""

import triton
import triton.language as tl

from phase1.ops.elementwise import LOG2E

LOWEST = tl.constexpr(-60.0)  # of a log decay: exp(-60) forgets all that float32 can hold, and sums of it stay exact enough
UNSEEN = tl.constexpr(-1e30)  # an exponent whose exponential is 0
FIRST_MAXIMUM = tl.constexpr(-1e20)  # of no scores yet: far above UNSEEN, far below any score
NOWHERE = tl.constexpr(1 << 30)  # a position that no window holds


@triton.jit
def load_rows(p, m, o_i, o, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `o_i` after `p`, a row of (·, N), zero where `m` is not set or past column N: [rows, columns]."""
    if o.shape[0] == N:
        return tl.load(p + o_i[:, None] * N + o[None, :], mask=m[:, None], other=0.0)
    return tl.load(p + o_i[:, None] * N + o[None, :], mask=m[:, None] & (o < N)[None, :], other=0.0)


@triton.jit
def load_columns(p, m, o_i, o, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same rows transposed: [columns, rows]."""
    if o.shape[0] == N:
        return tl.load(p + o_i[None, :] * N + o[:, None], mask=m[None, :], other=0.0)
    return tl.load(p + o_i[None, :] * N + o[:, None], mask=m[None, :] & (o < N)[:, None], other=0.0)


@triton.jit
def store_rows(p, m, o_i, o, value, N: tl.constexpr):  # type: ignore[no-untyped-def]
    if o.shape[0] == N:
        tl.store(p + o_i[:, None] * N + o[None, :], value.to(p.dtype.element_ty), mask=m[:, None])
    else:
        tl.store(p + o_i[:, None] * N + o[None, :], value.to(p.dtype.element_ty), mask=m[:, None] & (o < N)[None, :])


@triton.jit
def store_columns(p, m, o_i, o, value, N: tl.constexpr):  # type: ignore[no-untyped-def]
    if o.shape[0] == N:
        tl.store(p + o_i[None, :] * N + o[:, None], value.to(p.dtype.element_ty), mask=m[None, :])
    else:
        tl.store(p + o_i[None, :] * N + o[:, None], value.to(p.dtype.element_ty), mask=m[None, :] & (o < N)[:, None])


@triton.jit
def load_state(p, o_r, o_p, there, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """One (R, P) state, zero outside and if it is not `there`: [o_r, o_p]; with their axes exchanged, its transpose.

    `there`, 0 or 1, is a number of the launch, not of the compilation: a state known to be zero makes the compiler peel a
    loop's first round, which doubles the code and spills registers.
    """
    return tl.load(p + o_r * P + o_p, mask=(o_r < there * R) & (o_p < P), other=0.0)


@triton.jit
def load_log2_a(log_a, m, o_i):  # type: ignore[no-untyped-def]
    """log2 of the decays."""
    return tl.maximum(tl.load(log_a + o_i, mask=m, other=0.0), LOWEST) * LOG2E


@triton.jit
def _in_window(after, W):  # type: ignore[no-untyped-def]
    """0 <= after < W in one comparison: what is below 0 is large without its sign."""
    return after.to(tl.uint32) < W.to(tl.uint32)


@triton.jit(do_not_specialize=["T", "L", "NS"])
def state_kernel(  # type: ignore[no-untyped-def]
    v, x, dt, log_a, added, total, T, L, NS,
    R: tl.constexpr, P: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr, C: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """What each stretch adds to the state, `added` (B·H, NS, R, P), and the log2 of its decay, `total` (B·H, NS)."""
    i_s, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r, o_p, o_c = tl.arange(0, RB), tl.arange(0, PB), tl.arange(0, C)
    S = tl.zeros([RB, PB], tl.float32)
    since = 0.0
    for c in range(NC):
        t0 = (i_s * NC + c) * C
        m = t0 + o_c < T
        row = i_bh * T + t0
        b_vT = load_columns(v + row * R, m, o_c, o_r, R)
        b_x = load_rows(x + (i_bh * L + (L - T) + t0) * P, m, o_c, o_p, P)
        b_log_a = load_log2_a(log_a + row, m, o_c)
        b_dt = tl.load(dt + row + o_c, mask=m, other=0.0)
        sum_ = tl.cumsum(b_log_a, 0)
        last = tl.sum(b_log_a, 0)
        b_wT = (b_vT.to(tl.float32) * (tl.exp2(last - sum_) * b_dt)[None, :]).to(b_x.dtype)
        S = S * tl.exp2(last) + tl.dot(b_wT, b_x, input_precision="ieee")
        since += last
    p = added + (i_bh * NS + i_s) * R * P
    tl.store(p + o_r[:, None] * P + o_p[None, :], S, mask=(o_r < R)[:, None] & (o_p < P)[None, :])
    tl.store(total + i_bh * NS + i_s, since)


@triton.jit
def _compose(a, s, b, r):  # type: ignore[no-untyped-def]
    """(a, s) then (b, r): S -> a S + s, followed by S -> b S + r."""
    return a * b, s * b + r


@triton.jit(do_not_specialize=["NS"])
def carry_kernel(  # type: ignore[no-untyped-def]
    added, total, first, states, NS,
    HAS_FIRST: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S_{i+1} = exp2(total_i) S_i + added_i from S_0 = `first`: `states` (B·H, NS + 1, R P), all of them.

    REVERSE runs from the last stretch to the first, and `states` holds the result at i for i + 1: E_NS = `first`,
    E_i = exp2(total_i) E_{i+1} + added_i at row i, so that row i + 1 is what stretch i ends with.
    """
    i_e, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = i_e * COLS + tl.arange(0, COLS)
    o_j = tl.arange(0, ROWS)
    mo = o < RP
    if HAS_FIRST:  # noqa: SIM108
        S = tl.load(first + i_bh * RP + o, mask=mo, other=0.0)
    else:
        S = tl.zeros([COLS], tl.float32)
    begin = NS if REVERSE else 0
    tl.store(states + (i_bh * (NS + 1) + begin) * RP + o, S, mask=mo)
    for j0 in range(0, NS, ROWS):
        j = j0 + o_j
        m = j < NS
        i = tl.where(m, NS - 1 - j if REVERSE else j, 0)
        a = tl.exp2(tl.load(total + i_bh * NS + i, mask=m, other=0.0))
        s = tl.load(added + (i_bh * NS + i)[:, None] * RP + o[None, :], mask=m[:, None] & mo[None, :], other=0.0)
        a2 = a[:, None] + tl.zeros([ROWS, COLS], tl.float32)
        a2, s = tl.associative_scan((a2, s), 0, _compose)
        s += a2 * S[None, :]
        to = i if REVERSE else i + 1
        tl.store(states + (i_bh * (NS + 1) + to)[:, None] * RP + o[None, :], s, mask=m[:, None] & mo[None, :])
        S = tl.sum(tl.where((o_j == ROWS - 1)[:, None], s, 0.0), 0)


@triton.jit
def _far(b_u, b_vT, b_x, sum_, b_dt, S):  # type: ignore[no-untyped-def]
    """f_t = S_tᵀ u_t of one chunk, and the chunk's (C, C) weights of v·u: exp2(Σ log2 a) dt, zero above the diagonal."""
    o = tl.arange(0, b_u.shape[0])
    decay = tl.exp2(tl.where(o[:, None] >= o[None, :], sum_[:, None] - sum_[None, :], UNSEEN)) * b_dt[None, :]
    s = (tl.dot(b_u, b_vT, input_precision="ieee") * decay).to(b_x.dtype)
    f = tl.dot(b_u, S.to(b_x.dtype), input_precision="ieee") * tl.exp2(sum_)[:, None]
    return tl.dot(s, b_x, f, input_precision="ieee"), decay


@triton.jit(do_not_specialize=["T", "L", "NS", "W", "has_first"])
def forward_kernel(  # type: ignore[no-untyped-def]
    u, v, q, k, x, dt, log_a, scale, skip, states, y, lse, T, L, NS, W, has_first, eps: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr, C: tl.constexpr,
    NC: tl.constexpr, KB: tl.constexpr, NK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """y = scale rms(f) + window attention + skip x, chunk by chunk; with one stretch also the final state.

    Keys of a chunk's window are read in NK blocks of KB, the last of which ends with the chunk.
    """
    i_s, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    o_r, o_p, o_c, o_k = tl.arange(0, RB), tl.arange(0, PB), tl.arange(0, C), tl.arange(0, KB)
    past = L - T
    p_S = states + (i_bh * (NS + 1) + i_s) * R * P
    S = load_state(p_S, o_r[:, None], o_p[None, :], has_first, R, P)
    b_scale = tl.load(scale + h * P + o_p, mask=o_p < P, other=0.0)
    b_skip = tl.load(skip + h)
    to_log2: tl.constexpr = R**-0.5 * LOG2E
    for c in range(NC):
        t0 = (i_s * NC + c) * C
        m = t0 + o_c < T
        row, row_x = i_bh * T + t0, i_bh * L + past + t0
        b_u = load_rows(u + row * R, m, o_c, o_r, R)
        b_vT = load_columns(v + row * R, m, o_c, o_r, R)
        b_x = load_rows(x + row_x * P, m, o_c, o_p, P)
        b_log_a = load_log2_a(log_a + row, m, o_c)
        b_dt = tl.load(dt + row + o_c, mask=m, other=0.0)
        sum_ = tl.cumsum(b_log_a, 0)
        last = tl.sum(b_log_a, 0)
        f, _ = _far(b_u, b_vT, b_x, sum_, b_dt, S)
        b_wT = (b_vT.to(tl.float32) * (tl.exp2(last - sum_) * b_dt)[None, :]).to(b_x.dtype)
        S = S * tl.exp2(last) + tl.dot(b_wT, b_x, input_precision="ieee")
        r = tl.rsqrt(tl.sum(f * f, 1) / P + eps)
        out = f * r[:, None] * b_scale[None, :] + b_skip * b_x.to(tl.float32)
        if WINDOWED:
            b_q = load_rows(q + row * R, m, o_c, o_r, R)
            highest = tl.full([C], FIRST_MAXIMUM, tl.float32)
            z = tl.zeros([C], tl.float32)
            acc = tl.zeros([C, PB], tl.float32)
            for j in tl.static_range(NK):
                ahead = C - (NK - j) * KB  # of the chunk's first position
                s0 = t0 + ahead
                ms = (s0 + o_k >= -past) & (s0 + o_k < T)
                row_s = i_bh * L + past + s0
                b_kT = load_columns(k + row_s * R, ms, o_k, o_r, R)
                b_xs = load_rows(x + row_s * P, ms, o_k, o_p, P)
                seen = _in_window(o_c[:, None] - tl.where(ms, ahead + o_k, NOWHERE)[None, :], W)
                score = tl.where(seen, tl.dot(b_q, b_kT, input_precision="ieee"), UNSEEN)
                higher = tl.maximum(highest, tl.max(score, 1) * to_log2)
                a = tl.exp2(highest - higher)
                prob = tl.exp2(score * to_log2 - higher[:, None])
                z = z * a + tl.sum(prob, 1)
                acc = tl.dot(prob.to(b_x.dtype), b_xs, acc * a[:, None], input_precision="ieee")
                highest = higher
            z = tl.where(m, z, 1.0)
            out += acc * (1.0 / z)[:, None]
            tl.store(lse + row + o_c, highest + tl.log2(z), mask=m)
        store_rows(y + ((b * T + t0) * H + h) * P, m, o_c * H, o_p, out, P)
    if NS == 1:
        p = states + (i_bh * 2 + 1) * R * P
        tl.store(p + o_r[:, None] * P + o_p[None, :], S, mask=(o_r < R)[:, None] & (o_p < P)[None, :])


@triton.jit(do_not_specialize=["T", "L", "NS", "has_first"])
def far_backward_u_kernel(  # type: ignore[no-untyped-def]
    u, v, x, dt, log_a, scale, states, dy, df, du, uw, d_added, sums, T, L, NS, has_first, eps: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr, C: tl.constexpr,
    NC: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """In the order of time: df = d loss / d f, du, uw = u·du, what a stretch adds to the gradient of scale, if CARRIED to dS.

    `sums` (B·NS, H P + H): gradients of scale and, by `backward_v_kernel`, of skip.
    """
    i_s, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    o_r, o_p, o_c = tl.arange(0, RB), tl.arange(0, PB), tl.arange(0, C)
    past = L - T
    p_S = states + (i_bh * (NS + 1) + i_s) * R * P
    S = load_state(p_S, o_r[:, None], o_p[None, :], has_first, R, P)
    ST = load_state(p_S, o_r[None, :], o_p[:, None], has_first, R, P)
    b_scale = tl.load(scale + h * P + o_p, mask=o_p < P, other=0.0)
    sum_scale = tl.zeros([PB], tl.float32)
    if CARRIED:
        dS = tl.zeros([RB, PB], tl.float32)
        since = 0.0
    for c in range(NC):
        t0 = (i_s * NC + c) * C
        m = t0 + o_c < T
        row, row_x = i_bh * T + t0, i_bh * L + past + t0
        b_u = load_rows(u + row * R, m, o_c, o_r, R)
        b_vT = load_columns(v + row * R, m, o_c, o_r, R)
        b_x = load_rows(x + row_x * P, m, o_c, o_p, P)
        b_log_a = load_log2_a(log_a + row, m, o_c)
        b_dt = tl.load(dt + row + o_c, mask=m, other=0.0)
        sum_ = tl.cumsum(b_log_a, 0)
        last = tl.sum(b_log_a, 0)
        f, decay = _far(b_u, b_vT, b_x, sum_, b_dt, S)
        w = tl.exp2(last - sum_) * b_dt
        b_dy = load_rows(dy + ((b * T + t0) * H + h) * P, m, o_c * H, o_p, P).to(tl.float32)
        r = tl.rsqrt(tl.sum(f * f, 1) / P + eps)
        n = f * r[:, None]
        sum_scale += tl.sum(b_dy * n, 0)
        e = b_dy * b_scale[None, :]
        b_df = (r[:, None] * (e - n * (tl.sum(n * e, 1) / P)[:, None])).to(b_x.dtype)
        store_rows(df + row * P, m, o_c, o_p, b_df, P)
        b_xT = load_columns(x + row_x * P, m, o_c, o_p, P)
        b_v = load_rows(v + row * R, m, o_c, o_r, R)
        b_du = tl.dot(b_df, ST.to(b_x.dtype), input_precision="ieee") * tl.exp2(sum_)[:, None]
        dA = (tl.dot(b_df, b_xT, input_precision="ieee") * decay).to(b_x.dtype)
        b_du = tl.dot(dA, b_v, b_du, input_precision="ieee")
        ST = ST * tl.exp2(last) + tl.dot(b_xT, (b_v.to(tl.float32) * w[:, None]).to(b_x.dtype), input_precision="ieee")
        tl.store(uw + row + o_c, tl.sum(b_du * b_u.to(tl.float32), 1), mask=m)
        store_rows(du + row * R, m, o_c, o_r, b_du, R)
        S = S * tl.exp2(last) + tl.dot((b_vT.to(tl.float32) * w[None, :]).to(b_x.dtype), b_x, input_precision="ieee")
        if CARRIED:
            b_uT = load_columns(u + row * R, m, o_c, o_r, R)
            b_uT = (b_uT.to(tl.float32) * tl.exp2(since + sum_)[None, :]).to(b_x.dtype)
            dS = tl.dot(b_uT, b_df, dS, input_precision="ieee")
            since += last
    if CARRIED:
        p = d_added + (i_bh * NS + i_s) * R * P
        tl.store(p + o_r[:, None] * P + o_p[None, :], dS, mask=(o_r < R)[:, None] & (o_p < P)[None, :])
    tl.store(sums + (b * NS + i_s) * H * (P + 1) + h * P + o_p, sum_scale, mask=o_p < P)


@triton.jit(do_not_specialize=["T", "L", "W"])
def near_backward_q_kernel(  # type: ignore[no-untyped-def]
    q, k, x, dy, lse, delta, dq, T, L, W,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr,
    C: tl.constexpr, KB: tl.constexpr, NK: tl.constexpr,
):  # fmt: skip
    """dq and delta = Σ_s prob dprob of each block of C queries."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    o_r, o_p, o_c, o_k = tl.arange(0, RB), tl.arange(0, PB), tl.arange(0, C), tl.arange(0, KB)
    past = L - T
    t0 = i_t * C
    m = t0 + o_c < T
    row = i_bh * T + t0
    b_q = load_rows(q + row * R, m, o_c, o_r, R)
    b_dy = load_rows(dy + ((b * T + t0) * H + h) * P, m, o_c * H, o_p, P)
    b_lse = tl.load(lse + row + o_c, mask=m, other=0.0)
    to_log2: tl.constexpr = R**-0.5 * LOG2E
    by_dprob = tl.zeros([C, RB], tl.float32)  # Σ prob dprob k
    by_prob = tl.zeros([C, RB], tl.float32)  # Σ prob k
    b_delta = tl.zeros([C], tl.float32)
    for j in range(NK):
        ahead = C - (NK - j) * KB  # of the first query
        s0 = t0 + ahead
        ms = (s0 + o_k >= -past) & (s0 + o_k < T)
        row_s = i_bh * L + past + s0
        b_kT = load_columns(k + row_s * R, ms, o_k, o_r, R)
        b_k = load_rows(k + row_s * R, ms, o_k, o_r, R)
        b_xT = load_columns(x + row_s * P, ms, o_k, o_p, P)
        seen = _in_window(o_c[:, None] - tl.where(ms, ahead + o_k, NOWHERE)[None, :], W)
        prob = tl.where(seen, tl.exp2(tl.dot(b_q, b_kT, input_precision="ieee") * to_log2 - b_lse[:, None]), 0.0)
        weighted = prob * tl.dot(b_dy, b_xT, input_precision="ieee")
        b_delta += tl.sum(weighted, 1)
        if NK == 1:
            by_dprob = tl.dot((weighted - prob * b_delta[:, None]).to(b_k.dtype), b_k, input_precision="ieee")
        else:
            by_dprob = tl.dot(weighted.to(b_k.dtype), b_k, by_dprob, input_precision="ieee")
            by_prob = tl.dot(prob.to(b_k.dtype), b_k, by_prob, input_precision="ieee")
    tl.store(delta + row + o_c, b_delta, mask=m)
    store_rows(dq + row * R, m, o_c, o_r, (by_dprob - b_delta[:, None] * by_prob) * R**-0.5, R)


@triton.jit(do_not_specialize=["T", "L", "W"])
def near_backward_keys_kernel(  # type: ignore[no-untyped-def]
    q, k, x, dy, skip, lse, delta, dk, dx, T, L, W,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr,
    C: tl.constexpr, KB: tl.constexpr, NK: tl.constexpr,
):  # fmt: skip
    """dk, and what the window and D x add to dx, of each block of C of the L keys, from NK blocks of KB queries."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    o_r, o_p, o_c, o_k = tl.arange(0, RB), tl.arange(0, PB), tl.arange(0, C), tl.arange(0, KB)
    past = L - T
    s0 = i_t * C - past
    ms = s0 + o_c < T
    row_s = i_bh * L + past + s0
    to_log2: tl.constexpr = R**-0.5 * LOG2E
    b_k = load_rows(k + row_s * R, ms, o_c, o_r, R)
    b_x = load_rows(x + row_s * P, ms, o_c, o_p, P)
    b_dk = tl.zeros([C, RB], tl.float32)
    b_dx = load_rows(dy + ((b * T + s0) * H + h) * P, ms & (s0 + o_c >= 0), o_c * H, o_p, P).to(tl.float32) * tl.load(skip + h)
    for j in range(NK):
        t0 = s0 + j * KB
        mt = (t0 + o_k < T) & (t0 + o_k >= 0)
        row, row_y = i_bh * T + t0, (b * T + t0) * H + h
        b_qT = load_columns(q + row * R, mt, o_k, o_r, R)
        b_q = load_rows(q + row * R, mt, o_k, o_r, R)
        b_dyT = load_columns(dy + row_y * P, mt, o_k * H, o_p, P)
        b_dy = load_rows(dy + row_y * P, mt, o_k * H, o_p, P)
        b_lse = tl.load(lse + row + o_k, mask=mt, other=0.0)
        b_delta = tl.load(delta + row + o_k, mask=mt, other=0.0)
        seen = _in_window(tl.where(mt, j * KB + o_k, -NOWHERE)[None, :] - o_c[:, None], W)
        prob = tl.where(seen, tl.exp2(tl.dot(b_k, b_qT, input_precision="ieee") * to_log2 - b_lse[None, :]), 0.0)
        b_dx = tl.dot(prob.to(b_x.dtype), b_dy, b_dx, input_precision="ieee")
        ds = prob * (tl.dot(b_x, b_dyT, input_precision="ieee") - b_delta[None, :])
        b_dk = tl.dot(ds.to(b_x.dtype), b_q, b_dk, input_precision="ieee")
    store_rows(dk + row_s * R, ms, o_c, o_r, b_dk * R**-0.5, R)
    store_rows(dx + row_s * P, ms, o_c, o_p, b_dx, P)


@triton.jit(do_not_specialize=["T", "L", "NS", "has_last"])
def far_backward_v_kernel(  # type: ignore[no-untyped-def]
    u, v, x, dt, log_a, skip, states, d_states, dy, df, uw, dv, dx, d_dt, d_log_a, sums, T, L, NS, has_last,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr, C: tl.constexpr,
    NC: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Against the order of time: dv, dx (if ADD added to what is there, else with D x), d_dt, d_log_a, and that of skip.

    Row i + 1 of `d_states` is the gradient of the state that stretch i ends with; none unless `has_last`.
    With G_t = Σ_{j≤t} log a_j, d loss / d G_t = u·du - v·dv at t, and at the end of the stretch S·dS as well.
    """
    i_s, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    o_r, o_p, o_c = tl.arange(0, RB), tl.arange(0, PB), tl.arange(0, C)
    past = L - T
    b_skip = tl.load(skip + h)
    end = (i_bh * (NS + 1) + i_s + 1) * R * P
    dS = load_state(d_states + end, o_r[:, None], o_p[None, :], has_last, R, P)
    dG = tl.sum(tl.sum(dS * load_state(states + end, o_r[:, None], o_p[None, :], has_last, R, P), 1), 0)
    d_skip = tl.zeros([C], tl.float32)
    for c in range(NC):
        t0 = (i_s * NC + NC - 1 - c) * C
        m = t0 + o_c < T
        row, row_x = i_bh * T + t0, i_bh * L + past + t0
        b_x = load_rows(x + row_x * P, m, o_c, o_p, P)
        b_dy = load_rows(dy + ((b * T + t0) * H + h) * P, m, o_c * H, o_p, P)
        d_skip += tl.sum(b_dy.to(tl.float32) * b_x.to(tl.float32), 1)
        if ADD:  # noqa: SIM108
            b_dx = load_rows(dx + row_x * P, m, o_c, o_p, P).to(tl.float32)
        else:
            b_dx = b_dy.to(tl.float32) * b_skip
        b_uT = load_columns(u + row * R, m, o_c, o_r, R)
        b_v = load_rows(v + row * R, m, o_c, o_r, R)
        b_df = load_rows(df + row * P, m, o_c, o_p, P)
        b_log_a = load_log2_a(log_a + row, m, o_c)
        b_dt = tl.load(dt + row + o_c, mask=m, other=0.0)
        sum_ = tl.cumsum(b_log_a, 0)
        last = tl.sum(b_log_a, 0)
        later = o_c[:, None] <= o_c[None, :]
        decay = tl.exp2(tl.where(later, sum_[None, :] - sum_[:, None], UNSEEN))
        to_end = tl.exp2(last - sum_)
        A = (tl.dot(b_v, b_uT, input_precision="ieee") * decay).to(b_x.dtype)
        dxs = tl.dot(b_v, dS.to(b_x.dtype), input_precision="ieee") * to_end[:, None]
        dxs = tl.dot(A, b_df, dxs, input_precision="ieee")
        tl.store(d_dt + row + o_c, tl.sum(dxs * b_x.to(tl.float32), 1), mask=m)
        store_rows(dx + row_x * P, m, o_c, o_p, b_dx + dxs * b_dt[:, None], P)
        # dv is made transposed, so that dS serves as it is
        b_xT = load_columns(x + row_x * P, m, o_c, o_p, P)
        b_vT = load_columns(v + row * R, m, o_c, o_r, R)
        causal = o_c[:, None] >= o_c[None, :]
        decayT = tl.exp2(tl.where(causal, sum_[:, None] - sum_[None, :], UNSEEN)) * b_dt[None, :]
        AT = (tl.dot(b_df, b_xT, input_precision="ieee") * decayT).to(b_x.dtype)
        dvT = tl.dot(dS.to(b_x.dtype), b_xT, input_precision="ieee") * (to_end * b_dt)[None, :]
        dvT = tl.dot(b_uT, AT, dvT, input_precision="ieee")
        store_columns(dv + row * R, m, o_c, o_r, dvT, R)
        b_uw = tl.load(uw + row + o_c, mask=m, other=0.0)
        diff = tl.where(m, b_uw - tl.sum(dvT * b_vT.to(tl.float32), 0), 0.0)
        tl.store(d_log_a + row + o_c, dG + tl.sum(diff, 0) - tl.cumsum(diff, 0) + diff, mask=m)
        dG += tl.sum(diff, 0)
        b_uT = (b_uT.to(tl.float32) * tl.exp2(sum_)[None, :]).to(b_x.dtype)
        dS = dS * tl.exp2(last) + tl.dot(b_uT, b_df, input_precision="ieee")
    tl.store(sums + (b * NS + i_s) * H * (P + 1) + H * P + h, tl.sum(d_skip, 0))
