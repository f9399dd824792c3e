"""Token tables, tied to the output: a dense one, and the HTT one with dense rows for frequent tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.ops.htt import Cores, htt_lookup, htt_table


class DenseTable(nn.Module):
    """One row of width D per token; the position of a token in the table is its id."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, d_model) / math.sqrt(d_model))

    def positions(self, ids: Tensor) -> Tensor:
        return ids

    def lookup(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)

    def table(self, dtype: torch.dtype) -> Tensor:
        """All rows; a parameter, so in its own dtype: the ops cast it."""
        return self.weight


class HTTTable(nn.Module):
    """Rows of the `dense_rows` first positions stored, the tail a holographic tensor train (ops/htt/reference.py).

    Args:
        vocab_size, d_model: V and D.
        rank: r, terms of the train.
        dense_rows: K, positions that have a row of their own.
        groups: v1; v2 = ceil((V - K) / v1) follows. Neighbours in `token_order` share a group.
        token_order: (V,) position of each id, frequent ids first, similar ids of the tail side by side; default: the id.
    """

    positions_of: Tensor

    def __init__(
        self, vocab_size: int, d_model: int, rank: int, dense_rows: int, groups: int, token_order: Tensor | None = None
    ) -> None:
        super().__init__()
        order = torch.arange(vocab_size) if token_order is None else torch.as_tensor(token_order).long()
        if not torch.equal(order.sort().values, torch.arange(vocab_size)):
            raise ValueError(f"token_order must hold every position 0 to {vocab_size - 1} once; it does not")
        self.vocab_size, self.dense_rows = vocab_size, dense_rows
        self.register_buffer("positions_of", order)
        v2 = math.ceil((vocab_size - dense_rows) / groups)
        d1 = max(d for d in range(1, math.isqrt(d_model) + 1) if d_model % d == 0)
        self.weight = nn.Parameter(torch.randn(dense_rows, d_model) / math.sqrt(d_model))
        core_std = (d_model * rank / 2) ** -0.25  # rows then start with the standard deviation of dense rows
        self.core_a = nn.Parameter(torch.randn(groups, rank, d1) * core_std)
        self.core_b = nn.Parameter(torch.randn(v2, rank, d_model // d1) * core_std)
        self.phase_a = nn.Parameter(torch.rand(groups, rank) * 2 * math.pi)
        self.phase_b = nn.Parameter(torch.rand(v2, rank) * 2 * math.pi)
        self.bias_a = nn.Parameter(torch.zeros(groups, d_model))
        self.bias_b = nn.Parameter(torch.zeros(v2, d_model))

    @property
    def cores(self) -> Cores:
        return Cores(self.core_a, self.core_b, self.phase_a, self.phase_b, self.bias_a, self.bias_b)

    def positions(self, ids: Tensor) -> Tensor:
        """Where ids stand in the table; ids below 0 (not scored) stay as they are."""
        return torch.where(ids < 0, ids, self.positions_of[ids.clamp(min=0)])

    def lookup(self, positions: Tensor) -> Tensor:
        """Rows (*, D) of the positions asked for; no other row is made."""
        tail = htt_lookup((positions - self.dense_rows).clamp(min=0), self.cores)
        if not self.dense_rows:
            return tail
        dense = F.embedding(positions.clamp(max=self.dense_rows - 1), self.weight)
        return torch.where((positions < self.dense_rows)[..., None], dense, tail)

    def table(self, dtype: torch.dtype) -> Tensor:
        """All V rows in the order of their positions."""
        tail = htt_table(self.cores, dtype)[: self.vocab_size - self.dense_rows]
        return torch.cat([self.weight.to(dtype), tail])
