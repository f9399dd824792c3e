"""Causal softmax attention: the sequence layer of the baseline."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phase1.layers.convolution import causal_conv, first_taps
from phase1.layers.norm import rms_norm
from phase1.layers.rotary import rotary, rotate

# Fastest first on the cards measured; PyTorch's own order prefers flash, which is slower than cuDNN's on Hopper.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Q_SCALE = 1.4  # γ at the start: scores then reach 11, as those of AR-SSM's window do at R = 32 and γ = 2


class AttentionState(NamedTuple):
    """Keys and values of all earlier positions, (B, t, H, P) each: grows with the context."""

    k: Tensor
    v: Tensor
    conv: Tensor | None = None  # (B, 3, 3 D) last inputs of the convolution, if there is one
    store: "Store | None" = None  # the larger buffer that k and v are views of

    def followed_by(self, k: Tensor, v: Tensor, conv: Tensor | None) -> "AttentionState":
        """The state with `k` and `v` (B, T, H, P) appended; `self` stays valid. Without gradients O(T), amortised."""
        if torch.is_grad_enabled():
            return AttentionState(torch.cat([self.k, k], 1), torch.cat([self.v, v], 1), conv)
        start, end = self.k.shape[1], self.k.shape[1] + k.shape[1]
        store = self.store
        if store is None or store.used != start or store.k.shape[1] < end:  # none, or continued by another text, or full
            store = Store(*(F.pad(old, (0, 0, 0, 0, 0, end)) for old in (self.k, self.v)))
        store.k[:, start:end], store.v[:, start:end], store.used = k, v, end
        return AttentionState(store.k[:, :end], store.v[:, :end], conv, store)

    def in_place(self, later: "AttentionState") -> "AttentionState":
        """The same state in the buffer of one that follows it, which has room for what comes next."""
        n, store = self.k.shape[1], later.store
        assert store is not None and store.used > n
        return AttentionState(store.k[:, :n], store.v[:, :n], self.conv, store)

    def forget_later(self) -> None:
        """Let the buffer be written from here on again."""
        if self.store is not None:
            self.store.used = self.k.shape[1]


class Store:
    """A buffer for keys and values, (B, capacity, H, P) each, of which the first `used` positions are filled."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.used = k, v, 0


class Attention(nn.Module):
    """softmax(Q Kᵀ / sqrt(P)) V over earlier positions, rotary positions, O(T²) work.

    Args:
        fused: use the fastest kernel, which keeps no scores; if false, matrix products that keep all T² of them.
        qk_norm: Q = γ ⊙ rms(Q'), K = rms(K') per head before the rotation, γ in R^{H×P}.
        conv: apply a causal depthwise convolution to Q', K' and V' first, and SiLU to the convolved V', as AR-SSM does.
        gate: y = W_o norm(attention ⊙ silu(W_z h)), as AR-SSM does; W_z is part of `in_proj`.

    Source of the options: Henry et al. 2020, "Query-key normalization for Transformers"; Dao and Gu 2024, "Transformers are
    SSMs", section 7.
    """

    def __init__(
        self, d_model: int, n_heads: int, fused: bool = True, qk_norm: bool = False, conv: bool = False, gate: bool = False
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.backends = BACKENDS if fused else [SDPBackend.MATH]
        self.in_proj = nn.Linear(d_model, (4 if gate else 3) * d_model, bias=False)
        self.q_scale = nn.Parameter(torch.full((n_heads, d_model // n_heads), Q_SCALE)) if qk_norm else None  # γ
        self.conv_weight = nn.Parameter(first_taps(3 * d_model)) if conv else None
        self.conv_bias = nn.Parameter(torch.zeros(3 * d_model)) if conv else None
        self.norm = nn.Parameter(torch.ones(d_model)) if gate else None
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, h: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState, None]:
        """(B, T, D) -> (B, T, D), the keys and values so far, and None: attention has no effective rank."""
        past = 0 if state is None else state.k.shape[1]
        D = h.shape[-1]
        mixed, gate = self.in_proj(h).split([3 * D, len(self.in_proj.weight) - 3 * D], -1)
        last = None
        if self.conv_weight is not None and self.conv_bias is not None:
            mixed, last = causal_conv(mixed, self.conv_weight, self.conv_bias, None if state is None else state.conv)
        q, k, v = mixed.unflatten(-1, (3, self.n_heads, -1)).unbind(2)  # [B, T, H, P] each
        if self.conv_weight is not None:
            v = F.silu(v)
        if self.q_scale is not None:
            q, k = rms_norm(q) * self.q_scale.to(q.dtype), rms_norm(k)
        angles = rotary(q, past)
        q, k = rotate(q, *angles), rotate(k, *angles)
        state = AttentionState(k, v, last) if state is None else state.followed_by(k, v, last)
        k, v = state.k, state.v
        mask: Tensor | None = None
        if past and q.shape[1] > 1:
            if h.is_cuda and not torch.is_grad_enabled():  # the fast kernels need no mask in memory
                from torch.nn.attention.bias import causal_lower_right  # a second to import

                mask = causal_lower_right(q.shape[1], k.shape[1])
            else:
                mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=h.device).tril(past)
        with sdpa_kernel(self.backends, set_priority=True):
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=not past
            )
        y = y.transpose(1, 2).flatten(2)
        if self.norm is not None:
            y = rms_norm(y * F.silu(gate), self.norm)
        return self.out_proj(y), state, None
