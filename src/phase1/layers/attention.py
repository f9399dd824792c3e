"""Causal softmax attention: the sequence layer of the baseline."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phase1.layers.rotary import rotary, rotate

# Fastest first on the cards measured; PyTorch's own order prefers flash, which is slower than cuDNN's on Hopper.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionState(NamedTuple):
    """Keys and values of all earlier positions, (B, t, H, P) each: grows with the context."""

    k: Tensor
    v: Tensor
    store: "Store | None" = None  # where they lie, with room for more

    def followed_by(self, k: Tensor, v: Tensor) -> "AttentionState":
        """This, and `k` and `v` (B, T, H, P) after it; without gradients in O(T), amortised, and this stays as it is."""
        if torch.is_grad_enabled():
            return AttentionState(torch.cat([self.k, k], 1), torch.cat([self.v, v], 1))
        start, end = self.k.shape[1], self.k.shape[1] + k.shape[1]
        store = self.store
        if store is None or store.used != start or store.k.shape[1] < end:  # none, or another text went on from here, or full
            store = Store(*(F.pad(old, (0, 0, 0, 0, 0, end)) for old in (self.k, self.v)))
        store.k[:, start:end], store.v[:, start:end], store.used = k, v, end
        return AttentionState(store.k[:, :end], store.v[:, :end], store)


class Store:
    """Memory for keys and values, (B, ≥ `used`, H, P) each."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.used = k, v, 0


class Attention(nn.Module):
    """softmax(Q Kᵀ / sqrt(P)) V over earlier positions, rotary positions, O(T²) work.

    Args:
        fused: by the fastest kernel, which keeps no scores; without, by matrix products that hold all T² of them.
    """

    def __init__(self, d_model: int, n_heads: int, fused: bool = True) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.backends = BACKENDS if fused else [SDPBackend.MATH]
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, h: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState, None]:
        """(B, T, D) -> (B, T, D), the keys and values so far, and None for the effective rank, which it has not."""
        past = 0 if state is None else state.k.shape[1]
        q, k, v = self.qkv(h).unflatten(-1, (3, self.n_heads, -1)).unbind(2)  # [B, T, H, P] each
        angles = rotary(q, past)
        q, k = rotate(q, *angles), rotate(k, *angles)
        state = AttentionState(k, v) if state is None else state.followed_by(k, v)
        k, v = state.k, state.v
        mask = None
        if past and q.shape[1] > 1:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=h.device).tril(past)
        with sdpa_kernel(self.backends, set_priority=True):
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=not past
            )
        return self.out(y.transpose(1, 2).flatten(2)), state, None
