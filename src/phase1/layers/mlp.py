"""SwiGLU feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """W_out (silu(W_gate h) ⊙ W_in h), hidden width 8/3 D rounded down to a multiple of 64 (at least 64).

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        width = max(64, d_model * 8 // 3 // 64 * 64)
        self.expand = nn.Linear(d_model, 2 * width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.expand(h).chunk(2, -1)
        return self.out(F.silu(gate) * value)
