"""Two-level softmax: first over the rows before the tail and the tail's groups, then over the rows of one group."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.ops.group_nll import group_nll, group_nll_reference


class Groups(nn.Module):
    """A tail of n rows in groups of s consecutive ones (the last may be smaller): p(j | h) = p(g | h) p(j | g, h), g = j // s.

    In the first level group g has the row Σ_j a_j E_j + r_g, where a is the softmax of its members' output biases b_j (taken
    without gradient), and the bias log Σ_j exp(b_j) + c_g. With r = c = 0 and equal rows inside each group, this is exactly the
    softmax over all rows. The second level is softmax_j(W h · E_j + b_j) over the members; W starts as the identity.

    Args:
        n: rows of the tail.
        size: s.
        d_model: D.
    """

    def __init__(self, n: int, size: int, d_model: int) -> None:
        super().__init__()
        self.n, self.size = n, size
        count = -(-n // size)
        self.rows = nn.Parameter(torch.zeros(count, d_model))
        self.bias = nn.Parameter(torch.zeros(count))

    def first_level(self, members: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (G, D) and biases (G,) of the groups, from those of their members, (n, D) and (n,)."""
        grouped = self._padded(bias)
        weights = grouped.detach().softmax(1).to(members.dtype)
        whole = self.n // self.size  # full groups; the last one apart, because padding it would copy all members
        split = whole * self.size
        means = torch.bmm(weights[:whole, None], members[:split].view(whole, self.size, -1))[:, 0]
        if split < self.n:
            means = torch.cat([means, weights[whole:, : self.n - split] @ members[split:]])
        return means + self.rows.to(means.dtype), grouped.logsumexp(1) + self.bias

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
