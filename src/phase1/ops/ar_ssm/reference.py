"""The definition of the mixer between its two projections: the operators' definitions, one after the other."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.semiseparable.reference import semiseparable_reference
from phase1.ops.window_attention.reference import window_attention_reference

TAPS = 4  # positions of the causal depthwise convolution


class Parameters(NamedTuple):
    """What the operator learns. H heads of P channels, R ranks, N hidden units of the rank gate."""

    conv_weight: Tensor  # (4, H P + 2 H R)
    conv_bias: Tensor  # (H P + 2 H R,)
    dt_bias: Tensor  # (H,)
    A_log: Tensor  # (H,)
    D: Tensor  # (H,)
    q_scale: Tensor  # (H, R), γ
    state_scale: Tensor  # (H, P), c
    norm: Tensor  # (H P,)
    gate_bias: Tensor | None  # (N,); None if no rank can be switched off
    gate_weight: Tensor | None  # (ranks that can, N)
    gate_out: Tensor | None  # (ranks that can,)


class State(NamedTuple):
    """All that later positions need of earlier ones; its size does not depend on the context."""

    position: int
    conv: Tensor  # (B, 3, H P + 2 H R) inputs of the convolution
    S: Tensor  # (B, H, R, P) state of the semiseparable operator
    k: Tensor  # (B, H, < w, R) keys of the window
    x: Tensor  # (B, H, < w, P) values of the window


def ar_ssm_reference(
    proj: Tensor, p: Parameters, *, window: int, memory: float, state: State | None = None, eps: float = 1e-5
) -> tuple[Tensor, State, Tensor]:
    """Everything of AR-SSM between its two projections.

    x, u', v' = conv(proj); x = silu(x); u', v' = rms(u'), rms(v') per head; g = sigmoid(W relu(hidden + b) + c), u = g u',
    v = g v', q = rotate(γ u'), k = rotate(v'); Δ = softplus(raw + dt_bias), log a = -exp(A_log) Δ - 1 / memory;
    S_t = a_t S_{t-1} + v_t (Δ_t x_t)ᵀ, y_t = c rms(S_tᵀ u_t) + window attention(q, k, x)_t + D x_t; norm rms(y silu(z)).

    Args:
        proj: (B, T, ·), columns x (H P), u' (H R), v' (H R), z (H P), raw (H), hidden (N).
        window: w, positions attended to; 0 for none.
        memory: positions in which the state fades to 1/e at least.
        state: what the positions before the first one left; None at the beginning of a text.
    Returns:
        (B, T, H P); the state after the last position; the mean of g, at least in float32.

    Source: docs/design.md; Dao and Gu 2024, "Transformers are SSMs", section 7 (the block).
    """
    (H, R), (P, T) = p.q_scale.shape, (p.state_scale.shape[1], proj.shape[1])
    N = 0 if p.gate_weight is None else p.gate_weight.shape[1]
    mixed, z, raw, hidden = proj.split([H * (P + 2 * R), H * P, H, N], -1)
    mixed = F.pad(mixed, (0, 0, TAPS - 1, 0)) if state is None else torch.cat([state.conv, mixed], 1)
    conv = p.conv_bias + sum(mixed[:, j : j + T] * p.conv_weight[j] for j in range(TAPS))
    x, u, v = conv.split([H * P, H * R, H * R], -1)
    x = F.silu(x).unflatten(-1, (H, P))
    u, v = _rms(u.unflatten(-1, (H, R)), eps), _rms(v.unflatten(-1, (H, R)), eps)
    g = proj.new_ones(*proj.shape[:2], R)
    if p.gate_weight is not None and p.gate_bias is not None and p.gate_out is not None:
        free = torch.sigmoid(F.relu(hidden + p.gate_bias) @ p.gate_weight.T + p.gate_out)
        g = F.pad(free, (R - len(p.gate_weight), 0), value=1.0)
    mean = g.mean(dtype=torch.promote_types(g.dtype, torch.float32))
    dt = F.softplus(raw + p.dt_bias)
    start = 0 if state is None else state.position
    far, S = semiseparable_reference(
        u * g[:, :, None], v * g[:, :, None], x * dt[..., None], -p.A_log.exp() * dt - 1 / memory,
        None if state is None else state.S,
    )  # fmt: skip
    y = _rms(far, eps) * p.state_scale + p.D[:, None] * x
    q, k = _rotate(u * p.q_scale, start), _rotate(v, start)
    if state is not None:
        k, x = torch.cat([state.k.transpose(1, 2), k], 1), torch.cat([state.x.transpose(1, 2), x], 1)
    if window:
        y = y + window_attention_reference(q, k, x, window=window, past=k.shape[1] - T)
    k, x = (tensor[:, max(0, tensor.shape[1] - max(0, window - 1)) :].transpose(1, 2) for tensor in (k, x))
    return _rms(y.flatten(2) * F.silu(z), eps) * p.norm, State(start + T, mixed[:, T:], S, k, x), mean


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, start: int) -> Tensor:
    """Turn channels j and j + R/2 of position t by t 10000^(-2j/R)."""
    half = x.shape[-1] // 2
    position = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float64)
    angle = position[:, None, None] * 10000.0 ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
