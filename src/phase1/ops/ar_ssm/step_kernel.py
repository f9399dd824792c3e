"""Triton kernel of one token: the mixer between its two projections, without the norm behind it, from the state before it.

Columns of the projection, (B, ·), are those of `operands_kernel`. Sizes that no block depends on are numbers of the launch, so
that the kernel which was checked is the one that runs. All is read once: sums are as fast as products of blocks.
"""

import triton
import triton.language as tl

from phase1.ops.ar_ssm.core_kernel import load_rows, store_rows
from phase1.ops.ar_ssm.operands_kernel import TAPS, convolved, get, put, taps_of
from phase1.ops.elementwise import LOG2E, sigmoid, softplus
from phase1.ops.rotary.kernel import angle_of


@triton.jit
def _convolution(proj, past, weight, bias, columns, m, conv):  # type: ignore[no-untyped-def]
    """Some columns of the convolution's output, for the 3 rows of inputs in `past` and the one in `proj`."""
    x3, x2, x1 = get(past, columns, m), get(past + conv, columns, m), get(past + 2 * conv, columns, m)
    w0, w1, w2, w3, c = taps_of(weight, bias, columns, m, conv)
    return convolved(x3, x2, x1, get(proj, columns, m), w0, w1, w2, w3, c)


@triton.jit
def _move_up(proj, past, after, columns, m, conv):  # type: ignore[no-untyped-def]
    """Some columns of the convolution's inputs: what the next position finds in `past`."""
    put(after, columns, m, get(past + conv, columns, m))
    put(after + conv, columns, m, get(past + 2 * conv, columns, m))
    put(after + 2 * conv, columns, m, get(proj, columns, m))


@triton.jit
def _head(proj, past, weight, bias, first, o_r, conv, eps, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """u' or v' of a head, whose columns begin at `first`: normalised, and the same with channels j and j + R/2 exchanged."""
    m = o_r < R
    x = _convolution(proj, past, weight, bias, first + o_r, m, conv)
    exchanged = _convolution(proj, past, weight, bias, first + (o_r + R // 2) % R, m, conv)
    r = tl.rsqrt(tl.sum(x * x) / R + eps)
    return x * r, exchanged * r


@triton.jit
def _rank_gate(  # type: ignore[no-untyped-def]
    hidden, bias, weight, out, o_r, N, R: tl.constexpr, FIXED: tl.constexpr, NB: tl.constexpr
):  # fmt: skip
    """g = sigmoid(W relu(hidden + b) + c), and 1 for the first FIXED ranks."""
    g = tl.where(o_r < R, 1.0, 0.0)
    if FIXED < R:
        free = (o_r >= FIXED) & (o_r < R)
        logit = get(out, o_r - FIXED, free)
        for first in range(0, N, NB):
            o_n = first + tl.arange(0, NB)
            mn = o_n < N
            h = tl.maximum(get(hidden, o_n, mn) + get(bias, o_n, mn), 0.0)
            W = get(weight, (o_r - FIXED)[:, None] * N + o_n[None, :], free[:, None] & mn[None, :])
            logit += tl.sum(W * h[None, :], 1)
        g = tl.where(free, sigmoid(logit), g)
    return g


@triton.jit
def _window(  # type: ignore[no-untyped-def]
    q, key, value, k, x, k_after, x_after, past, kept, o_r, o_p, R: tl.constexpr, P: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    """Σ_s softmax_s(q · k_s / sqrt(R)) x_s over `past` rows and this position's; the last `kept` of them stay."""
    to_log2: tl.constexpr = R**-0.5 * LOG2E
    highest = tl.sum(q * key) * to_log2
    z = 1.0
    acc = value
    leave = past + 1 - kept
    for first in range(0, past, KB):
        s = first + tl.arange(0, KB)
        m = s < past
        b_k, b_x = load_rows(k, m, s, o_r, R), load_rows(x, m, s, o_p, P)
        store_rows(k_after, m & (s >= leave), s - leave, o_r, b_k, R)
        store_rows(x_after, m & (s >= leave), s - leave, o_p, b_x, P)
        score = tl.where(m, tl.sum(b_k.to(tl.float32) * q[None, :], 1) * to_log2, -1e30)
        higher = tl.maximum(highest, tl.max(score, 0))
        a = tl.exp2(highest - higher)
        prob = tl.where(m, tl.exp2(score - higher), 0.0)
        z = z * a + tl.sum(prob)
        acc = acc * a + tl.sum(prob[:, None] * b_x.to(tl.float32), 0)
        highest = higher
    if kept > 0:
        put(k_after + (kept - 1) * R, o_r, o_r < R, key)
        put(x_after + (kept - 1) * P, o_p, o_p < P, value)
    return acc / z


@triton.jit(do_not_specialize=["position", "position_after", "H", "N", "past", "kept", "stride_b"])
def step_kernel(  # type: ignore[no-untyped-def]
    proj, weight, bias, dt_bias, A_log, skip, q_scale, state_scale, gate_bias, gate_weight, gate_out,
    position, conv, S, k, x, y, gate, position_after, conv_after, S_after, k_after, x_after,
    H, N, past, kept, stride_b, forget, eps, R: tl.constexpr, P: tl.constexpr, FIXED: tl.constexpr,
    RB: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """y (B, H P), in front of the gated norm, the mean of the gate (B,), and the state after this token; a program a head.

    READ: `position` is in memory, where a graph finds another one at every launch, and `position_after` is written too.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    o_r, o_p = tl.arange(0, RB), tl.arange(0, PB)
    mr, mp = o_r < R, o_p < P
    width = H * (P + 2 * R)
    proj += b * stride_b
    conv += b * (TAPS - 1) * width
    conv_after += b * (TAPS - 1) * width
    b_S = load_rows(S + i_bh * R * P, mr, o_r, o_p, P).to(tl.float32)
    at_x, at_u, at_v = h * P, H * P + h * R, H * P + H * R + h * R
    c = _convolution(proj, conv, weight, bias, at_x + o_p, mp, width)
    b_x = c * sigmoid(c)
    u, u_exchanged = _head(proj, conv, weight, bias, at_u, o_r, width, eps, R)
    v, v_exchanged = _head(proj, conv, weight, bias, at_v, o_r, width, eps, R)
    _move_up(proj, conv, conv_after, at_x + o_p, mp, width)
    _move_up(proj, conv, conv_after, at_u + o_r, mr, width)
    _move_up(proj, conv, conv_after, at_v + o_r, mr, width)
    raw = proj + width + H * P
    g = _rank_gate(raw + H, gate_bias, gate_weight, gate_out, o_r, N, R, FIXED, NB)
    dt = softplus(tl.load(raw + h).to(tl.float32) + tl.load(dt_bias + h))
    a = tl.exp(-tl.exp(tl.load(A_log + h)) * dt - forget)
    b_S = b_S * a + (g * v)[:, None] * (dt * b_x)[None, :]
    store_rows(S_after + i_bh * R * P, mr, o_r, o_p, b_S, P)
    f = tl.sum(b_S * (g * u)[:, None], 0)
    out = f * tl.rsqrt(tl.sum(f * f) / P + eps) * get(state_scale + h * P, o_p, mp) + tl.load(skip + h) * b_x
    if READ:
        position = tl.load(position)
    HALF: tl.constexpr = R // 2
    angle = angle_of(position, o_r % HALF, HALF)
    cos, sin = tl.cos(angle), tl.sin(angle) * tl.where(o_r < HALF, -1.0, 1.0)
    scale, scale_exchanged = get(q_scale + h * R, o_r, mr), get(q_scale + h * R, (o_r + HALF) % R, mr)
    q, key = u * scale * cos + u_exchanged * scale_exchanged * sin, v * cos + v_exchanged * sin
    k += i_bh * past * R
    x += i_bh * past * P
    out += _window(q, key, b_x, k, x, k_after + i_bh * kept * R, x_after + i_bh * kept * P, past, kept, o_r, o_p, R, P, KB)
    put(y + i_bh * P, o_p, mp, out)
    if h == 0:
        tl.store(gate + b, tl.sum(g) / R)
    if READ:  # noqa: SIM102  # a constant, without which there is nothing to write to
        if i_bh == 0:
            tl.store(position_after, position + 1)
