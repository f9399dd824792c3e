"""Two-level softmax: first over the rows before the tail and the tail's groups, then over the rows of one group."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.ops.group_nll import group_nll, group_nll_reference


class Groups(nn.Module):
    """A tail of n rows in groups of s consecutive ones (the last may be smaller): p(j | h) = p(g | h) p(j | g, h), g = j // s.

    In the first level group g has the row Σ_j a_j E_j + r_g, where a is the softmax of its members' output biases b_j (taken
    without gradient), and the bias log Σ_j exp(b_j) + c_g. With r = c = 0 and equal rows inside each group, this is exactly
    the softmax over all rows. The second level is softmax_j(W h · E_j + b_j) over the members, with W = I + up down, which
    starts as the identity. r_g has numbers in the first ρ coordinates alone, and ρ is the rank of up down: both cost little
    beside the tail.

    Args:
        n: rows of the tail.
        size: s.
        d_model: D.
        rank: ρ, at most D.
    """

    def __init__(self, n: int, size: int, d_model: int, rank: int) -> None:
        super().__init__()
        self.n, self.size = n, size
        count = -(-n // size)
        self.rows = nn.Parameter(torch.zeros(count, rank))
        self.bias = nn.Parameter(torch.zeros(count))
        with torch.random.fork_rng(devices=()):  # equal seeds give the rest of a model equal weights with it and without
            self.down, self.up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(torch.eye(rank, d_model))
            self.up.weight.zero_()

    def first_level(self, members: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (G, D) and biases (G,) of the groups, from those of their members, (n, D) and (n,)."""
        grouped = self._padded(bias)
        weights = grouped.detach().softmax(1).to(members.dtype)
        whole = self.n // self.size  # full groups; the last one apart, because padding it would copy all members
        split = whole * self.size
        means = torch.bmm(weights[:whole, None], members[:split].view(whole, self.size, -1))[:, 0]
        if split < self.n:
            means = torch.cat([means, weights[whole:, : self.n - split] @ members[split:]])
        rows = F.pad(self.rows, (0, means.shape[1] - self.rows.shape[1])).to(means.dtype)
        return means + rows, grouped.logsumexp(1) + self.bias

    def states(self, hidden: Tensor) -> Tensor:
        """W h of the second level, for hidden (..., D)."""
        return hidden + self.up(self.down(hidden))

    def nll(self, states: Tensor, members: Tensor, bias: Tensor, targets: Tensor, fused: bool = True) -> Tensor:
        """Second level: -log p(t | its group), (N,), for states W h (N, D) and targets below n; 0 where they are negative."""
        form = group_nll if fused else group_nll_reference
        return form(states, members, bias, targets, self.size)

    def log_probabilities(self, first: Tensor, states: Tensor, members: Tensor, bias: Tensor) -> Tensor:
        """log p of all n rows, (..., n), from those of the groups, `first` (..., G)."""
        z = states @ members.T
        z = self._padded(z.to(first.dtype) + bias).log_softmax(-1) + first[..., None]
        return z.flatten(-2)[..., : self.n]

    def _padded(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., G, s), filled with -inf where the last group has no member."""
        missing = len(self.rows) * self.size - self.n
        return F.pad(x, (0, missing), value=-torch.inf).unflatten(-1, (len(self.rows), self.size))
