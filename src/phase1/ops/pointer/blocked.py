"""The pointer in blocks of w queries against 2w keys, a few at a time: O(T·w) time, memory for a few blocks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.pointer.reference import check_arguments

CHUNK_BYTES = 16 * 2**20  # of scores held at once: they stay in the cache of a large card
NO_TOKEN = -1  # the filling of the last block, and of the one before the first


def pointer_log_probability(q: Tensor, k: Tensor, ids: Tensor, targets: Tensor, *, window: int, past: int = 0) -> Tensor:
    """Fast form of `pointer_log_probability_reference`: same arguments, result, gradients and errors."""
    check_arguments(q, k, ids, targets, past, window)
    if not targets.numel():
        return q.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    keep = min(past, window)  # older positions are out of every query's window
    return _Pointer.apply(q, k[:, past - keep :], ids[:, past - keep :], targets, min(window, k.shape[1]), keep)


class _Pointer(torch.autograd.Function):
    """Keeps no scores: the backward pass computes them again, from the two normalizers of every query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, ids: Tensor, targets: Tensor, window: int, past: int) -> Tensor:
        T = q.shape[1]
        blocks = _Blocks.cut(q, k, ids, targets, window, past)
        wide = torch.promote_types(q.dtype, torch.float32)
        total, copied = (torch.empty(blocks.q.shape[:2], dtype=wide, device=q.device) for _ in range(2))
        with torch.autocast(q.device.type, enabled=False):
            for part in blocks.parts():
                scores, unseen, other = blocks.scores(part, wide)
                torch.logsumexp(scores.masked_fill_(unseen, -torch.inf), -1, out=total[part])
                torch.logsumexp(scores.masked_fill_(other, -torch.inf), -1, out=copied[part])
        ctx.save_for_backward(q, k, ids, targets, total, copied)
        ctx.window, ctx.past = window, past
        return (copied - total).view(len(q), -1)[:, :T]

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        q, k, ids, targets, total, copied = ctx.saved_tensors
        B, T = targets.shape
        blocks = _Blocks.cut(q, k, ids, targets, ctx.window, ctx.past)
        weight = F.pad(d_result, (0, total.numel() // B - T)).view_as(total).masked_fill(copied == -torch.inf, 0)
        d_q, d_k = torch.empty_like(blocks.q), torch.empty_like(blocks.k)
        scale = q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, enabled=False):
            for part in blocks.parts():
                scores, unseen, other = blocks.scores(part, total.dtype)
                d_scores = (scores - copied[part, :, None]).exp_().masked_fill_(other | unseen, 0)
                d_scores -= scores.sub_(total[part, :, None]).exp_().masked_fill_(unseen, 0)
                d_scores = d_scores.mul_(weight[part, :, None] * scale).to(q.dtype)
                torch.bmm(d_scores, blocks.k[part], out=d_q[part])
                torch.bmm(d_scores.transpose(1, 2), blocks.q[part], out=d_k[part])
        d_k = _joined(d_k.unflatten(0, (B, -1)), ctx.past, k.shape[1])
        return d_q.view(B, -1, q.shape[-1])[:, :T], d_k, None, None, None, None


class _Blocks(NamedTuple):
    """N = B ⌈T / C⌉ blocks of C queries, each with the S keys it can see among others: w + C, or all where one block is all."""

    q: Tensor  # (N, C, d)
    k: Tensor  # (N, S, d)
    ids: Tensor  # (N, S), NO_TOKEN where there is none
    targets: Tensor  # (N, C)
    unseen: Tensor  # (C, S), s after t or w before it

    @classmethod
    def cut(cls, q: Tensor, k: Tensor, ids: Tensor, targets: Tensor, window: int, past: int) -> "_Blocks":
        C = min(window, q.shape[1])
        before = past
        if q.shape[1] > C:  # then w = C
            before, fill = C, -q.shape[1] % C
            q, k = F.pad(q, (0, 0, 0, fill)), F.pad(k, (0, 0, C - past, fill))
            targets, ids = F.pad(targets, (0, fill), value=NO_TOKEN), F.pad(ids, (C - past, fill), value=NO_TOKEN)
        spans = [tensor.unsqueeze(1) if q.shape[1] == C else _spans(tensor, C) for tensor in (k, ids)]
        t = torch.arange(C, device=q.device)[:, None] + before
        s = torch.arange(spans[0].shape[2], device=q.device)
        k, ids = (tensor.flatten(0, 1) for tensor in spans)
        q, targets = (tensor.unflatten(1, (-1, C)).flatten(0, 1) for tensor in (q, targets))
        return cls(q, k, ids, targets, (s > t) | (s <= t - window))

    def parts(self) -> Iterator[slice]:
        """Stretches of blocks that are computed together."""
        count = max(1, CHUNK_BYTES // (4 * self.unseen.numel()))
        return (slice(start, start + count) for start in range(0, len(self.q), count))

    def scores(self, part: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q · k / sqrt(d), (n, C, S); where s is not seen or is filling; where it does not hold the target."""
        scores = torch.bmm(self.q[part], self.k[part].transpose(1, 2)).to(wide).mul_(self.q.shape[-1] ** -0.5)
        ids = self.ids[part, None, :]
        return scores, self.unseen | (ids == NO_TOKEN), self.targets[part, :, None] != ids


def _spans(tensor: Tensor, C: int) -> Tensor:
    """(B, C + N·C, ...) -> (B, N, 2C, ...): every block with the one before it."""
    blocks = tensor.unflatten(1, (-1, C))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2)


def _joined(spans: Tensor, past: int, length: int) -> Tensor:
    """(B, N, S, d) -> (B, length, d): sums the two copies of every key, and takes the filling off."""
    if spans.shape[1] == 1:
        return spans[:, 0]
    C = spans.shape[2] // 2
    joined = F.pad(spans[:, :, C:], (0, 0, 0, 0, 1, 0))
    joined[:, :-1] += spans[:, :, :C]
    return joined.flatten(1, 2)[:, C - past :][:, :length]
