"""The pointer as three Triton kernels that hold one tile of scores: the normalizers, gradients by queries, gradients by keys.

Products are 32 rows high: larger ones select instructions (wgmma) that Triton 3.4 to 3.7.0 miscompiles on Hopper, as it does
transposed accumulators; so the scores of the gradients by keys are made transposed. Sizes of the text are not specialized:
their value 1 has met a compiler error as well, and every length would be compiled again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase1.ops.elementwise import LN2, LOG2E

NONE = tl.constexpr(-1e30)  # score of a key that does not count: no number is subtracted from -inf

ROWS, COLUMNS = 32, 64  # of a tile of scores
SIZES = ["T", "S", "past", "W"]


@triton.jit
def _targets(targets, b, t, valid, T):  # type: ignore[no-untyped-def]
    """Targets of the queries t; -1 for none, which is no id."""
    found = tl.load(targets + b * T + t, mask=valid, other=-1)
    return tl.where(found < 0, -1, found).to(tl.int32)


@triton.jit
def _keys(bias, ids, b, s, valid, S):  # type: ignore[no-untyped-def]
    """Bias of the keys s in base 2, and their ids; -2, which is no target, past the last."""
    row = b * S + s
    key_bias = tl.load(bias + row, mask=valid, other=0.0).to(tl.float32) * LOG2E
    return key_bias, tl.load(ids + row, mask=valid, other=-2).to(tl.int32)


@triton.jit
def _tile(x, start, stride, n, o_d, valid, d):  # type: ignore[no-untyped-def]
    """Rows n of x, (n, d)."""
    places = x + start + n.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(places, mask=valid[:, None] & (o_d < d)[None, :], other=0.0)


@triton.jit
def _turned(x, start, stride, n, o_d, valid, d):  # type: ignore[no-untyped-def]
    """Rows n of x as columns, (d, n)."""
    places = x + start + n.to(tl.int64)[None, :] * stride + o_d[:, None]
    return tl.load(places, mask=valid[None, :] & (o_d < d)[:, None], other=0.0)


@triton.jit
def _weights(total, copied, d_result, b, t, valid, T):  # type: ignore[no-untyped-def]
    """Normalizers of the queries t in base 2, and the gradient of their result: 0 where nothing matches."""
    row = b * T + t
    lt = tl.load(total + row, mask=valid, other=0.0) * LOG2E
    lc = tl.load(copied + row, mask=valid, other=float("-inf")) * LOG2E
    w = tl.where(lc == float("-inf"), 0.0, tl.load(d_result + row, mask=valid, other=0.0))
    return lt, tl.where(lc == float("-inf"), 0.0, lc), w


@triton.jit(do_not_specialize=SIZES)
def _forward(  # type: ignore[no-untyped-def]
    q, q_batch, q_row, k, k_batch, k_row, bias, ids, targets, total, copied, scale, T, S, past, W,
    d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BN)
    t = i_t * BM + tl.arange(0, BM)
    valid = t < T
    queries = _tile(q, b * q_batch, q_row, t, o_d, valid, d)
    target = _targets(targets, b, t, valid, T)
    top, top_copied = tl.full([BM], NONE, tl.float32), tl.full([BM], NONE, tl.float32)
    z, z_copied = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    first = tl.maximum(0, past + i_t * BM - W + 1) // BN * BN
    last = tl.minimum(S, past + i_t * BM + BM)
    for s0 in range(first, last, BN):
        s = s0 + o_n
        keys = _turned(k, b * k_batch, k_row, s, o_d, s < S, d)
        key_bias, key_ids = _keys(bias, ids, b, s, s < S, S)
        seen = (s[None, :] <= t[:, None] + past) & (s[None, :] > t[:, None] + past - W)
        same = seen & (target[:, None] == key_ids[None, :])
        scores = tl.dot(queries, keys, input_precision="ieee") * (scale * LOG2E) + key_bias[None, :]
        new = tl.maximum(top, tl.max(tl.where(seen, scores, NONE), 1))
        z = z * tl.exp2(top - new) + tl.sum(tl.where(seen, tl.exp2(scores - new[:, None]), 0.0), 1)
        top = new
        # a maximum of their own: what is copied may be far below what is not
        new = tl.maximum(top_copied, tl.max(tl.where(same, scores, NONE), 1))
        z_copied = z_copied * tl.exp2(top_copied - new) + tl.sum(tl.where(same, tl.exp2(scores - new[:, None]), 0.0), 1)
        top_copied = new
    found = z_copied != 0.0  # also where it is no number
    z_copied = (top_copied + tl.log2(tl.where(found, z_copied, 1.0))) * LN2
    tl.store(total + b * T + t, (top + tl.log2(z)) * LN2, mask=valid)
    tl.store(copied + b * T + t, tl.where(found, z_copied, float("-inf")), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _gradients_by_queries(  # type: ignore[no-untyped-def]
    q, q_batch, q_row, k, k_batch, k_row, bias, ids, targets, total, copied, d_result, d_q, scale, T, S, past, W,
    d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BN)
    t = i_t * BM + tl.arange(0, BM)
    valid = t < T
    queries = _tile(q, b * q_batch, q_row, t, o_d, valid, d)
    target = _targets(targets, b, t, valid, T)
    lt, lc, w = _weights(total, copied, d_result, b, t, valid, T)
    sums = tl.zeros([BM, D], tl.float32)
    first = tl.maximum(0, past + i_t * BM - W + 1) // BN * BN
    last = tl.minimum(S, past + i_t * BM + BM)
    for s0 in range(first, last, BN):
        s = s0 + o_n
        keys = _turned(k, b * k_batch, k_row, s, o_d, s < S, d)
        key_bias, key_ids = _keys(bias, ids, b, s, s < S, S)
        seen = (s[None, :] <= t[:, None] + past) & (s[None, :] > t[:, None] + past - W)
        same = seen & (target[:, None] == key_ids[None, :])
        scores = tl.dot(queries, keys, input_precision="ieee") * (scale * LOG2E) + key_bias[None, :]
        d_scores = tl.where(same, tl.exp2(scores - lc[:, None]), 0.0) - tl.where(seen, tl.exp2(scores - lt[:, None]), 0.0)
        keys_again = _tile(k, b * k_batch, k_row, s, o_d, s < S, d)
        sums = tl.dot(d_scores.to(keys_again.dtype), keys_again, sums, input_precision="ieee")
    # weighed last: half precision sees numbers of order 1, whatever the scale of the loss
    out = d_q + (b * T + t)[:, None] * d + o_d[None, :]
    tl.store(out, (sums * (w * scale)[:, None]).to(d_q.dtype.element_ty), mask=valid[:, None] & (o_d < d)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _gradients_by_keys(  # type: ignore[no-untyped-def]
    q, q_batch, q_row, k, k_batch, k_row, bias, ids, targets, total, copied, d_result, d_k, d_bias, scale, T, S, past, W,
    d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys in rows: BM of them against BN queries at a time."""
    i_s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BN)
    s = i_s * BM + tl.arange(0, BM)
    valid = s < S
    keys = _tile(k, b * k_batch, k_row, s, o_d, valid, d)
    key_bias, key_ids = _keys(bias, ids, b, s, valid, S)
    sums, sums_bias = tl.zeros([BM, D], tl.float32), tl.zeros([BM], tl.float32)
    first = tl.maximum(0, i_s * BM - past) // BN * BN
    last = tl.minimum(T, i_s * BM + BM - past + W - 1)
    for t0 in range(first, last, BN):
        t = t0 + o_n
        queries = _turned(q, b * q_batch, q_row, t, o_d, t < T, d)
        target = _targets(targets, b, t, t < T, T)
        lt, lc, w = _weights(total, copied, d_result, b, t, t < T, T)
        seen = (s[:, None] <= t[None, :] + past) & (s[:, None] > t[None, :] + past - W) & (t < T)[None, :]
        same = seen & (target[None, :] == key_ids[:, None])
        scores = tl.dot(keys, queries, input_precision="ieee") * (scale * LOG2E) + key_bias[:, None]
        d_scores = tl.where(same, tl.exp2(scores - lc[None, :]), 0.0) - tl.where(seen, tl.exp2(scores - lt[None, :]), 0.0)
        sums_bias += tl.sum(d_scores * w[None, :], 1)
        # half precision sees weights of order 1, whatever the scale of the loss
        largest = tl.max(tl.abs(w), 0)
        d_scores *= (w / tl.where(largest == 0.0, 1.0, largest))[None, :]
        queries_again = _tile(q, b * q_batch, q_row, t, o_d, t < T, d)
        sums += largest * tl.dot(d_scores.to(queries_again.dtype), queries_again, input_precision="ieee")
    out = d_k + (b * S + s)[:, None] * d + o_d[None, :]
    tl.store(out, (sums * scale).to(d_k.dtype.element_ty), mask=valid[:, None] & (o_d < d)[None, :])
    tl.store(d_bias + b * S + s, sums_bias, mask=valid)


def _arguments(q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor) -> list[Tensor | int]:
    """Operands as the kernels read them: rows of q and k without gaps inside, at any distance; the others without gaps."""
    out: list[Tensor | int] = []
    for x in (q, k):
        x = x if x.stride(-1) == 1 else x.contiguous()
        out += [x, x.stride(0), x.stride(1)]
    return out + [x.contiguous() for x in (bias, ids, targets)]


def _settings(q: Tensor, k: Tensor, window: int, past: int) -> tuple[list[float | int], dict[str, int]]:
    d = q.shape[-1]
    sizes = [q.shape[1], k.shape[1], past, min(window, k.shape[1])]
    tile = {"d": d, "D": max(16, triton.next_power_of_2(d)), "BM": ROWS, "BN": COLUMNS}
    return [d**-0.5, *sizes], tile | {"num_warps": 4, "num_stages": 2}


def normalizers(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, window: int, past: int
) -> tuple[Tensor, Tensor]:
    """`blocked.normalizers` in one kernel."""
    total, copied = (torch.empty(targets.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    sizes, settings = _settings(q, k, window, past)
    if total.numel():
        grid = (triton.cdiv(q.shape[1], ROWS), len(q))
        _forward[grid](*_arguments(q, k, bias, ids, targets), total, copied, *sizes, **settings)
    return total, copied


def gradients(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, total: Tensor, copied: Tensor, d_result: Tensor,
    window: int, past: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`blocked.gradients` in two kernels; no atomic additions, so it repeats to the bit."""
    d_q, d_k, d_bias = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, bias))
    sizes, settings = _settings(q, k, window, past)
    operands = [*_arguments(q, k, bias, ids, targets), total, copied, d_result.contiguous()]
    if d_q.numel():
        _gradients_by_queries[(triton.cdiv(q.shape[1], ROWS), len(q))](*operands, d_q, *sizes, **settings)
    if d_k.numel():
        _gradients_by_keys[(triton.cdiv(k.shape[1], ROWS), len(k))](*operands, d_k, d_bias, *sizes, **settings)
    return d_q, d_k, d_bias
