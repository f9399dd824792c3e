"""SwiGLU feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """W_down (silu(W_gate h) ⊙ W_up h), hidden width 8/3 D rounded down to a multiple of 64 (at least 64).

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        width = max(64, d_model * 8 // 3 // 64 * 64)
        self.gate_up_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.gate_up_proj(h).chunk(2, -1)
        return self.down_proj(F.silu(gate) * value)
