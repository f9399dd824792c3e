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
        if state is not None:
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        mask = None
        if past:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=h.device).tril(past)
        with sdpa_kernel(self.backends, set_priority=True):
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None
            )
        return self.out(y.transpose(1, 2).flatten(2)), AttentionState(k, v), None
