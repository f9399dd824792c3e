"""AR-SSM: the adaptive-rank semiseparable sequence layer, y = (T + tril(U Vᵀ)) x per head, in O(T)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.layers.rotary import rotate
from phase1.ops.semiseparable import semiseparable
from phase1.ops.window_attention import window_attention

CONV_WIDTH = 4  # positions of the causal depthwise convolution in front of u, v and x


class ARSSMState(NamedTuple):
    """All that later positions need of earlier ones; its size does not depend on the context."""

    position: int
    conv: Tensor  # (B, CONV_WIDTH - 1, channels) inputs of the convolution
    S: Tensor  # (B, H, R, P) state of the semiseparable operator
    k: Tensor  # (B, ≤ w, H, R) keys of the window
    x: Tensor  # (B, ≤ w, H, P) values of the window


class Operands(NamedTuple):
    """What the operator of one layer is made of, after projections, convolution and gate."""

    u: Tensor  # (B, T, H, R), gate applied
    v: Tensor  # (B, T, H, R), gate applied
    q: Tensor  # (B, T, H, R), rotated query of the window
    k: Tensor  # (B, T, H, R), rotated key of the window
    x: Tensor  # (B, T, H, P)
    step: Tensor  # (B, T, H), input scale of the state
    log_decay: Tensor  # (B, T, H), ≤ 0
    rank_gate: Tensor  # (B, T, R) in [0, 1]


class RankGate(nn.Module):
    """g_t = 1 for the first `min_rank` ranks, sigmoid of a small network of h_t for the others: (B, T, D) -> (B, T, R)."""

    def __init__(self, d_model: int, max_rank: int, min_rank: int) -> None:
        super().__init__()
        self.min_rank = min_rank
        if max_rank > min_rank:
            self.hidden = nn.Linear(d_model, max(8, d_model // 8))
            self.out = nn.Linear(self.hidden.out_features, max_rank - min_rank)
            nn.init.constant_(self.out.bias, 2.0)  # gates start open: sigmoid(2) = 0.88

    def forward(self, h: Tensor) -> Tensor:
        if not hasattr(self, "out"):
            return h.new_ones(*h.shape[:2], self.min_rank)
        free = torch.sigmoid(self.out(F.relu(self.hidden(h))))
        return F.pad(free, (self.min_rank, 0), value=1.0)


class ARSSM(nn.Module):
    """Mixer with U, V, the values x, the decay and the output gate all computed from the input.

    S_t = a_t S_{t-1} + v_t (Δ_t x_t)ᵀ,  y_t = c ⊙ rms(S_tᵀ u_t) + (T x)_t,  u_t = g_t ⊙ u'_t,  v_t = g_t ⊙ v'_t
    a_t = exp(-exp(A) Δ_t),  Δ_t = softplus(W h_t + b),  (T x)_t = window attention + skip ⊙ x_t

    u' and v' are RMS-normalised per head; rotated, and u' scaled by γ, they are also the queries and keys of the window,
    which so costs no projection of its own. rms is over the channels of a head: it takes the size out of Σ, not the rank.
    Source: docs/design.md; Dao and Gu 2024, "Transformers are SSMs", section 7 (the block).
    """

    def __init__(self, d_model: int, n_heads: int, max_rank: int, min_rank: int, window: int) -> None:
        super().__init__()
        self.n_heads, self.max_rank, self.window = n_heads, max_rank, window
        self.channels = d_model + 2 * n_heads * max_rank
        self.project = nn.Linear(d_model, self.channels + d_model, bias=False)  # x, u, v through the convolution; gate
        self.step = nn.Linear(d_model, n_heads)
        self.rank_gate = RankGate(d_model, max_rank, min_rank)
        self.conv_weight = nn.Parameter(torch.empty(CONV_WIDTH, self.channels))
        self.conv_bias = nn.Parameter(torch.zeros(self.channels))
        self.log_rate = nn.Parameter(torch.linspace(1, 16, n_heads).log())  # A
        self.skip = nn.Parameter(torch.ones(n_heads))
        if window:
            self.q_scale = nn.Parameter(torch.full((n_heads, max_rank), 2.0))  # γ
        self.state_scale = nn.Parameter(torch.full((n_heads, d_model // n_heads), 0.25))  # c
        self.norm = nn.RMSNorm(d_model)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.uniform_(self.conv_weight, -(CONV_WIDTH**-0.5), CONV_WIDTH**-0.5)
        step = torch.logspace(-3, -1, self.n_heads)  # Δ at the start: memories of different lengths
        with torch.no_grad():
            self.step.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def operands(self, h: Tensor, state: ARSSMState | None = None) -> tuple[Operands, Tensor, Tensor]:
        """The operator's operands for input (B, T, D); with them the output gate and the convolution's inputs."""
        start = 0 if state is None else state.position
        mixed, gate = self.project(h).split([self.channels, h.shape[-1]], -1)
        left = mixed.new_zeros(h.shape[0], CONV_WIDTH - 1, self.channels) if state is None else state.conv
        mixed = torch.cat([left, mixed], 1)
        kernel = self.conv_weight.to(mixed.dtype)
        T = h.shape[1]
        conv = sum(mixed[:, j : j + T] * kernel[j] for j in range(CONV_WIDTH)) + self.conv_bias.to(mixed.dtype)
        x, u, v = conv.split([h.shape[-1]] + 2 * [self.n_heads * self.max_rank], -1)
        x = F.silu(x).unflatten(-1, (self.n_heads, -1))
        u, v = (_unit(part.unflatten(-1, (self.n_heads, -1))) for part in (u, v))
        rank_gate = self.rank_gate(h)
        step = F.softplus(self.step(h).to(torch.promote_types(h.dtype, torch.float32)))
        q = k = u[..., :0]
        if self.window:
            q = rotate(u * self.q_scale.to(u.dtype), start)
            k = rotate(v, start)
        g = rank_gate[:, :, None].to(u.dtype)
        return Operands(u * g, v * g, q, k, x, step, -self.log_rate.exp() * step, rank_gate), gate, mixed[:, T:]

    def forward(self, h: Tensor, state: ARSSMState | None = None) -> tuple[Tensor, ARSSMState, Tensor]:
        """(B, T, D) -> (B, T, D), the state after the last position, and the effective rank (mean of Σ g)."""
        o, gate, conv = self.operands(h, state)
        S = None if state is None else state.S
        y, S = semiseparable(o.u, o.v, (o.x * o.step[..., None]).to(o.u.dtype), o.log_decay, S)
        y = _unit(y) * self.state_scale.to(y.dtype) + o.x * self.skip[:, None].to(o.x.dtype)
        k, x = (o.k, o.x) if state is None else (torch.cat([state.k, o.k], 1), torch.cat([state.x, o.x], 1))
        if self.window:
            y = y + window_attention(o.q, k, x, window=self.window, past=k.shape[1] - h.shape[1])
        y = self.norm((y.flatten(2) * F.silu(gate)).to(h.dtype))
        keep = slice(max(0, k.shape[1] - self.window), None)
        position = h.shape[1] + (0 if state is None else state.position)
        effective_rank = o.rank_gate.to(o.step.dtype).sum(-1).mean()
        return self.out(y), ARSSMState(position, conv, S, k[:, keep], x[:, keep]), effective_rank


def _unit(x: Tensor) -> Tensor:
    """x divided by the root of its mean square over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5).to(x.dtype)
