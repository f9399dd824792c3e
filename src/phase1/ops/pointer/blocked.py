"""The pointer block by block of queries, each against the keys it can see: O(T·w) time, memory for one block of scores."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 512  # queries at a time, at most
CHUNK_BYTES = 32 * 2**20  # of scores held at once, unless so few queries are left that the products would be slow
FEWEST = 16  # queries at a time


def normalizers(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, window: int, past: int
) -> tuple[Tensor, Tensor]:
    """Log of the sum of exp(score) over the keys that each query sees, and over those of them that hold its target, (B, T)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    total, copied = (torch.empty(targets.shape, dtype=wide, device=q.device) for _ in range(2))
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys in _blocks(targets.shape, window, past):
            scores = _scores(q[:, rows], k[:, keys], bias[:, keys], wide)
            unseen, other = _masks(ids[:, keys], targets[:, rows], keys.start - rows.start - past, window)
            total[:, rows] = scores.masked_fill_(unseen, -torch.inf).logsumexp(-1)
            copied[:, rows] = scores.masked_fill_(other, -torch.inf).logsumexp(-1)
    return total, copied


def gradients(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, total: Tensor, copied: Tensor, d_result: Tensor,
    window: int, past: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and bias for that of copied - total; the scores are recomputed from the two normalizers."""
    scale = q.shape[-1] ** -0.5
    weight = d_result.masked_fill(copied == -torch.inf, 0) * scale
    d_q, d_bias = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, bias))
    d_k = torch.zeros(k.shape, dtype=total.dtype, device=k.device)
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys in _blocks(targets.shape, window, past):
            scores = _scores(q[:, rows], k[:, keys], bias[:, keys], total.dtype)
            unseen, other = _masks(ids[:, keys], targets[:, rows], keys.start - rows.start - past, window)
            d_scores = (scores - copied[:, rows, None]).exp_().masked_fill_(other | unseen, 0)
            d_scores -= scores.sub_(total[:, rows, None]).exp_().masked_fill_(unseen, 0)
            d_scores *= weight[:, rows, None]
            d_bias[:, keys] += d_scores.sum(1)
            d_scores = d_scores.to(q.dtype)
            d_q[:, rows] = d_scores @ k[:, keys]
            d_k[:, keys] += d_scores.transpose(1, 2) @ q[:, rows]
    return d_q, d_k.to(k.dtype), d_bias / scale


def _blocks(shape: tuple[int, ...], window: int, past: int) -> Iterator[tuple[slice, slice]]:
    """Stretches of queries, and of all keys that any of them can see."""
    B, T = shape
    window = min(window, past + T)
    size = CHUNK_BYTES // (4 * max(1, B) * (window + BLOCK)) // FEWEST * FEWEST
    size = min(max(size, FEWEST), BLOCK, max(1, window))
    for start in range(0, T, size):
        stop = min(start + size, T)
        # one key more than is seen: sizes of products stay multiples of 8
        yield slice(start, stop), slice(max(0, past + start - window), past + stop)


def _scores(q: Tensor, k: Tensor, bias: Tensor, wide: torch.dtype) -> Tensor:
    """q · k / sqrt(d) + bias, (B, C, S)."""
    return (q @ k.transpose(1, 2)).to(wide).mul_(q.shape[-1] ** -0.5).add_(bias[:, None])


def _masks(ids: Tensor, targets: Tensor, offset: int, window: int) -> tuple[Tensor, Tensor]:
    """Masks of key s, offset + s positions after the first query: not visible (C, S), and not the target (B, C, S)."""
    t = torch.arange(targets.shape[1], device=ids.device)[:, None]
    s = torch.arange(offset, offset + ids.shape[1], device=ids.device)
    return (s > t) | (s <= t - window), targets[:, :, None] != ids[:, None, :]
