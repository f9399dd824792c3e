"""SwiGLU feed-forward layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        return self.down_proj(swiglu(self.gate_up_proj(h)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up of (..., 2 n), gates first. Uncompiled it keeps its argument and nothing else, to the same bit."""
    if torch.compiler.is_compiling():  # which keeps as little by itself
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=d_up).mul_(d_result)
        torch.mul(d_result, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate_up
