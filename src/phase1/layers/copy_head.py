"""Copy head: a pointer to the last tokens of the text, mixed with the output's distribution."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.ops.pointer import pointer_log_probability, pointer_matrix

GATE_BIAS = -3.0  # the head begins with 5% of the probability, so that it disturbs an untrained output little
NO_ID = -2  # of a position that is no token; a target that is not scored is another
FORGET_BIAS = -8.0  # and forgets to 1/e in 3,000 positions


class CopyState(NamedTuple):
    """All that later positions need of earlier ones; its size does not depend on the context."""

    prev_key: Tensor  # (B, 1, d) W2 h of the last position, part of the key of the next one
    k: Tensor  # (B, ≤ w, d)
    bias: Tensor  # (B, ≤ w) -f summed over the positions after each
    ids: Tensor  # (B, ≤ w)

    def padded(self, window: int, id: int) -> "CopyState":
        """The same, of `window` positions: those before have no weight, and this id. All such states are of one size."""
        missing = window - self.k.shape[1]
        if not missing:
            return self
        k, bias = F.pad(self.k, (0, 0, missing, 0)), F.pad(self.bias, (missing, 0), value=-math.inf)
        return CopyState(self.prev_key, k, bias, F.pad(self.ids, (missing, 0), value=id))


class CopyHead(nn.Module):
    """p(v) = (1 - g_t) softmax(logits_t)_v + g_t Σ_s a_ts [x_s = v], a_t a pointer to the last `window` tokens, x_t among them.

    a_ts = softmax_s(q_t · k_s / sqrt(d) - Σ_{s<i≤t} f_i) with q_t = Wq h_t and k_s = W1 h_s + W2 h_{s-1}, h_{-1} = 0: a key
    knows the token and what came before it. f_i = softplus(w' · h_i + b') ≥ 0 forgets what precedes i: the end of an article
    may hide it all. g_t = sigmoid(w · h_t + b).

    Source: Merity et al. 2017, "Pointer sentinel mixture models", section 2; See et al. 2017, "Get to the point", section 2.2;
    f: Lin et al. 2025, "Forgetting Transformer", section 3.
    """

    def __init__(self, d_model: int, key_dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.qk_proj = nn.Linear(d_model, 3 * key_dim, bias=False)  # Wq, W1, W2
        nn.init.normal_(self.qk_proj.weight, std=0.02 * math.sqrt(512 / d_model))
        self.gate = nn.Parameter(torch.zeros(d_model))
        self.gate_bias = nn.Parameter(torch.full((1,), GATE_BIAS))
        self.forget = nn.Parameter(torch.zeros(d_model))
        self.forget_bias = nn.Parameter(torch.full((1,), FORGET_BIAS))

    def forward(
        self, hidden: Tensor, ids: Tensor, targets: Tensor, state: "CopyState | MakesState | None" = None
    ) -> tuple[Tensor, Tensor, CopyState]:
        """Log-odds o and gate logit log(g / (1 - g)), (B, T) each, at least float32, and the state after the last position.

        o_t = log(g_t / (1 - g_t)) + log Σ_s a_ts [x_s = y_t], -inf where no token matches.

        Args:
            hidden: normed final states h, (B, T, D).
            ids: x, (B, T).
            targets: y, (B, T); -100 matches nothing.
            state: what the text before has left, None at the beginning; or what makes it of these positions' keys.
        """
        q, *keys = self.queries_and_keys(hidden, ids, state)
        k, bias, ids, _ = keys
        gate = self._gate(hidden)
        past = k.shape[1] - q.shape[1]
        copied = pointer_log_probability(q, k, bias, ids, targets, window=self.window, past=past)
        return gate + copied, gate, self.state_of(*keys)

    def state_after(self, hidden: Tensor, ids: Tensor, state: CopyState | None) -> CopyState:
        """The state of `forward` alone."""
        _, *keys = self.queries_and_keys(hidden, ids, state)
        return self.state_of(*keys)

    def mixture(self, hidden: Tensor, ids: Tensor, logits: Tensor, state: CopyState | None) -> tuple[Tensor, CopyState]:
        """log p, (B, n, V), of the last n positions, those of the output's `logits` (B, n, V); and the new state.

        `hidden` (B, T, D) and `ids` (B, T) follow the text that left `state`.
        """
        q, *keys = self.queries_and_keys(hidden, ids, state)
        n = logits.shape[1]
        k, bias, ids = (part[:, -(self.window + n - 1) :] for part in keys[:3])  # what any of the last n sees
        first = hidden.shape[1] - n
        q, gate = q[:, first:], self._gate(hidden[:, first:])[..., None]
        pointer = pointer_matrix(q, k, bias, k.shape[1] - q.shape[1], self.window).exp()
        logits = logits.to(pointer.dtype)
        copied = torch.zeros_like(logits).scatter_add(2, ids[:, None, :].expand_as(pointer), pointer)
        copied = copied.clamp_min(torch.finfo(copied.dtype).tiny).log()
        log_p = torch.logaddexp(F.logsigmoid(-gate) + logits.log_softmax(-1), F.logsigmoid(gate) + copied)
        return log_p, self.state_of(*keys)

    def queries_and_keys(
        self, hidden: Tensor, ids: Tensor, state: "CopyState | MakesState | None"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, T, d); keys, Σ_{i≤s} f_i and ids of the positions in `state` and of these; W2 h of the last position."""
        q, k, prev_key = self.qk_proj(hidden).chunk(3, -1)
        bias = F.softplus(_dot(hidden, self.forget) + self.forget_bias).cumsum(1)
        if callable(state):
            state = state(self, k, prev_key, bias, ids)
        shifted = F.pad(prev_key, (0, 0, 1, 0)) if state is None else torch.cat([state.prev_key, prev_key], 1)
        k = k + shifted[:, :-1]
        if state is not None:
            k, bias, ids = (torch.cat(pair, 1) for pair in ((state.k, k), (state.bias, bias), (state.ids, ids)))
        return q, k, bias, ids, shifted[:, -1:]

    def state_of(self, k: Tensor, bias: Tensor, ids: Tensor, prev_key: Tensor) -> CopyState:
        """What later positions need of the keys so far."""
        keep = slice(max(0, k.shape[1] - self.window), None)
        return CopyState(prev_key, k[:, keep], bias[:, keep] - bias[:, -1:], ids[:, keep])

    def _gate(self, hidden: Tensor) -> Tensor:
        """w · h + b, (B, T)."""
        return _dot(hidden, self.gate) + self.gate_bias


MakesState = Callable[[CopyHead, Tensor, Tensor, Tensor, Tensor], CopyState]
"""The state before some positions, from the head, their W1 h and W2 h, (B, T, d) each, Σ_{i≤s} f_i and ids, (B, T) each."""


def _dot(hidden: Tensor, w: Tensor) -> Tensor:
    """w · h, (B, T): elementwise, because autocast would take a product in half precision."""
    return (hidden * w).sum(-1)
