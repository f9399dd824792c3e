"""The mixer between its two projections for one more token, in two kernels that a CUDA graph takes; nothing of it is learnt."""

from typing import Any

import torch
import triton
from torch import Tensor

from phase1.ops.ar_ssm.gated_norm_kernel import gated_norm_kernel
from phase1.ops.ar_ssm.reference import Parameters, State
from phase1.ops.ar_ssm.step_kernel import step_kernel

TILE = 4096  # numbers of a block of keys or values
HIDDEN = 64  # units of the rank gate at a time
WARPS = 8  # few programs run, each of them waits for memory: the more loads under way, the better


def step_forward(
    proj: Tensor, p: Parameters, window: int, memory: float, state: State, eps: float
) -> tuple[Tensor, State, Tensor]:
    """The result of `ar_ssm_step`: (B, 1, H P), the state after the token, and the mean of the gate."""
    (H, R), P, B = p.q_scale.shape, p.state_scale.shape[1], len(proj)
    assert proj.shape[1] == 1 and proj.stride(2) == 1 and window > 0
    conv, S, k, x = (part.contiguous() for part in state[1:])
    past = k.shape[2]
    kept = min(past, window - 2) + 1
    assert past < window
    position: Any = state.position
    read = isinstance(position, Tensor)
    position = torch.empty_like(position) if read else position + 1
    after = State(position, torch.empty_like(conv), torch.empty_like(S), k.new_empty(B, H, kept, R), x.new_empty(B, H, kept, P))
    y, gate = (torch.empty(shape, dtype=torch.float32, device=proj.device) for shape in ((B, H * P), B))
    free, N = (0, 0) if p.gate_weight is None else p.gate_weight.shape
    RB, PB = (max(16, triton.next_power_of_2(width)) for width in (R, P))
    step_kernel[(B * H,)](
        proj, *p[:7], *p[8:], state.position, conv, S, k, x, y, gate, *after,
        H, N, past, kept, proj.stride(0), 1 / memory, eps, R=R, P=P, FIXED=R - free, RB=RB, PB=PB, NB=HIDDEN,
        KB=TILE // max(RB, PB), READ=read, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    D, first = H * P, H * (P + 2 * R)
    out = torch.empty(B, 1, D, dtype=proj.dtype, device=proj.device)
    gated_norm_kernel[(B,)](
        y, proj[..., first : first + D], p.norm, out, B, 1, proj.stride(0), proj.stride(1), eps,
        D=D, DB=triton.next_power_of_2(D), ROWS=1, num_warps=4,
    )  # fmt: skip
    return out, after, gate[0] if B == 1 else gate.mean()
