"""AR-SSM: the adaptive-rank semiseparable sequence layer, y = (local + tril(U Vᵀ)) x per head, in O(T)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.layers.convolution import causal_conv, first_taps
from phase1.layers.norm import rms_norm
from phase1.layers.rotary import rotary, rotate
from phase1.ops.ar_ssm import Parameters, State, ar_ssm_step, fused_ar_ssm, fused_runs, step_runs
from phase1.ops.semiseparable import semiseparable
from phase1.ops.window_attention import window_attention


def from_first_key(state: State) -> State:
    """`state` with positions counted from the first key of its window: what follows is the same, for angles are differences.

    States of equal sizes then say the same of where they stand, so that one compiled function, or graph, takes them all. Its
    tensors are copies: they hold on to no larger ones that they were views of.
    """
    keys, conv, S, x = state.k.shape[2], state.conv.clone(), state.S.clone(), state.x.clone()
    if not keys:
        return State(0, conv, S, state.k, x)  # PyTorch 2.11 compiles no _replace
    exact = state.k.to(torch.promote_types(state.k.dtype, torch.float32))
    turned = rotate(exact, *rotary(exact[:, :1], keys - state.position))
    return State(keys, conv, S, turned.to(state.k.dtype), x)


class Operands(NamedTuple):
    """The operands of one layer's semiseparable operator and window, after projection, convolution and rank gate."""

    u: Tensor  # (B, T, H, R), gate applied
    v: Tensor  # (B, T, H, R), gate applied
    q: Tensor  # (B, T, H, R), rotated query of the window
    k: Tensor  # (B, T, H, R), rotated key of the window
    x: Tensor  # (B, T, H, P)
    dt: Tensor  # (B, T, H), Δ, step size of the state
    log_decay: Tensor  # (B, T, H), < 0
    rank_gate: Tensor  # (B, T, R) in [0, 1]


class RankGate(nn.Module):
    """g_t = 1 for the first `min_rank` ranks and sigmoid(W relu(hidden_t + b) + c) for the others: (B, T, N) -> (B, T, R).

    The first matrix of this small network is part of the mixer's `in_proj`. Its width N, `hidden`, is 0 if max_rank = min_rank.
    """

    def __init__(self, d_model: int, max_rank: int, min_rank: int) -> None:
        super().__init__()
        self.min_rank = min_rank
        self.hidden = max(8, d_model // 8) if max_rank > min_rank else 0
        if self.hidden:
            self.bias = nn.Parameter(torch.zeros(self.hidden))
            self.out_proj = nn.Linear(self.hidden, max_rank - min_rank)
            nn.init.constant_(self.out_proj.bias, 2.0)  # gates start open: sigmoid(2) = 0.88

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.hidden:
            return hidden.new_ones(*hidden.shape[:2], self.min_rank)
        free = torch.sigmoid(self.out_proj(F.relu(hidden + self.bias.to(hidden.dtype))))
        return F.pad(free, (self.min_rank, 0), value=1.0)


class ARSSM(nn.Module):
    """Mixer with U, V, the values x, the decay and the output gate all computed from the input.

    S_t = a_t S_{t-1} + v_t (Δ_t x_t)ᵀ,  y_t = c ⊙ rms(S_tᵀ u_t) + local_t,  u_t = g_t ⊙ u'_t,  v_t = g_t ⊙ v'_t
    a_t = exp(-exp(A_log) Δ_t - 1/M),  Δ_t = softplus(dt_t + dt_bias),  local_t = window attention(q, k, x)_t + D ⊙ x_t

    u' and v' are RMS-normalised per head. Rotated, and u' scaled by γ, they are also the queries and keys of the window, which
    therefore needs no projection of its own. rms, over the channels of a head, removes the size of the sum, not its rank.
    The state fades to 1/e within M = `memory` positions, so contexts longer than those of training do not fill it further.
    The parameter D, a number per head, is Mamba-2's skip; in shapes D is d_model.

    Source: docs/design.md; Dao and Gu 2024, "Transformers are SSMs", section 7 (the block).
    """

    def __init__(self, d_model: int, n_heads: int, max_rank: int, min_rank: int, window: int, memory: int) -> None:
        super().__init__()
        self.n_heads, self.max_rank, self.window, self.memory = n_heads, max_rank, window, memory
        self.channels = d_model + 2 * n_heads * max_rank
        self.rank_gate = RankGate(d_model, max_rank, min_rank)
        self.splits = [self.channels, d_model, n_heads, self.rank_gate.hidden]  # x, u', v' (convolved), gate z, dt, rank gate
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False)
        self.conv_weight = nn.Parameter(first_taps(self.channels))
        self.conv_bias = nn.Parameter(torch.zeros(self.channels))
        dt = torch.logspace(-3, -1, n_heads)  # Δ at the start: memories of different lengths
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.linspace(1, 16, n_heads).log())
        self.D = nn.Parameter(torch.ones(n_heads))
        if window:
            self.q_scale = nn.Parameter(torch.full((n_heads, max_rank), 2.0))  # γ
        self.state_scale = nn.Parameter(torch.full((n_heads, d_model // n_heads), 0.25))  # c
        self.norm = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def operator_parameters(self) -> Parameters:
        """The parameters of the operator between the two projections."""
        gate = self.rank_gate
        free = (gate.bias, gate.out_proj.weight, gate.out_proj.bias) if gate.hidden else (None, None, None)
        q_scale = self.q_scale if self.window else self.conv_bias.new_ones(self.n_heads, self.max_rank)
        conv = (self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D)
        return Parameters(*conv, q_scale, self.state_scale, self.norm, *free)

    def prove_kernels(self, dtype: torch.dtype) -> None:
        """Run the fused operator's self-check for inputs of `dtype`; in a compiled graph it could not run."""
        weight = self.in_proj.weight
        fused_runs(weight.new_empty(1, 1, len(weight), dtype=dtype), self.operator_parameters(), self.window)

    def forward(
        self, h: Tensor, state: State | Callable[["ARSSM", Tensor], tuple[Tensor, State]] | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """(B, T, D) -> (B, T, D), the state after the last position, and the effective rank (mean of Σ_r g_r).

        state: before the first position, None at the beginning of a text; or a function that computes it from this layer and
            the projected inputs, if earlier positions are on other ranks; it returns what to use as these too.
        """
        proj, p = self.in_proj(h), self.operator_parameters()
        if callable(state):
            proj, state = state(self, proj)
        graphed = state is not None and isinstance(state.position, Tensor)  # only the kernels of a step read it
        if state is not None and step_runs(proj, p, self.window):
            y, state, gate = ar_ssm_step(proj, p, window=self.window, memory=self.memory, state=state)
        elif not graphed and fused_runs(proj, p, self.window):
            y, state, gate = fused_ar_ssm(proj, p, window=self.window, memory=self.memory, state=state)
        else:
            y, state, gate = self.composed(proj, state)
        return self.out_proj(y), state, self.max_rank * gate

    def composed(self, proj: Tensor, state: State | None = None) -> tuple[Tensor, State, Tensor]:
        """`fused_ar_ssm` in PyTorch's operators, for CPUs and older GPUs: same result and gradients."""
        o, gate, conv = self.operands(proj, state)
        y, S = semiseparable(o.u, o.v, (o.x * o.dt[..., None]).to(o.u.dtype), o.log_decay, None if state is None else state.S)
        y = torch.addcmul(rms_norm(y) * self.state_scale.to(y.dtype), o.x, self.D[:, None].to(y.dtype))
        k, x, T = o.k, o.x, proj.shape[1]
        if state is not None:
            k, x = torch.cat([state.k.transpose(1, 2), k], 1), torch.cat([state.x.transpose(1, 2), x], 1)
        if self.window:
            y = y + window_attention(o.q, k, x, window=self.window, past=k.shape[1] - T)
        y = rms_norm(y.flatten(2) * F.silu(gate), self.norm)
        k, x = (tensor[:, max(0, tensor.shape[1] - max(0, self.window - 1)) :].transpose(1, 2) for tensor in (k, x))
        mean = o.rank_gate.mean(dtype=torch.promote_types(proj.dtype, torch.float32))
        return y, State(T + (0 if state is None else state.position), conv, S, k, x), mean

    def operands(self, proj: Tensor, state: State | None = None) -> tuple[Operands, Tensor, Tensor]:
        """The operands for `proj`, the result of `in_proj`; then the output gate z and the convolution's last inputs."""
        start = 0 if state is None else state.position
        mixed, gate, dt, ranks = proj.split(self.splits, -1)
        mixed, last = causal_conv(mixed, self.conv_weight, self.conv_bias, None if state is None else state.conv)
        x, uv = mixed.split([gate.shape[-1], 2 * self.n_heads * self.max_rank], -1)
        x = F.silu(x).unflatten(-1, (self.n_heads, -1))
        uv = rms_norm(uv.unflatten(-1, (2 * self.n_heads, -1)))
        u, v = uv.chunk(2, 2)
        rank_gate = self.rank_gate(ranks)
        dt = F.softplus(dt + self.dt_bias)  # at least float32, as the bias is
        q = k = u[..., :0]
        if self.window:
            angles = rotary(u, start)
            q, k = rotate(u * self.q_scale.to(u.dtype), *angles), rotate(v, *angles)
        u, v = (uv * rank_gate[:, :, None].to(uv.dtype)).chunk(2, 2)
        log_decay = -self.A_log.exp() * dt - 1 / self.memory
        return Operands(u, v, q, k, x, dt, log_decay, rank_gate), gate, last
