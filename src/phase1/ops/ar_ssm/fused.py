"""Launches the kernels of the mixer between its two projections, forward and backward."""

from functools import partial

import torch
import triton
from torch import Tensor

from phase1.ops.ar_ssm.core import Core, core_backward, core_forward
from phase1.ops.ar_ssm.gate_kernel import gate_backward_kernel, gate_kernel
from phase1.ops.ar_ssm.gated_norm_kernel import gated_norm_backward_kernel, gated_norm_kernel
from phase1.ops.ar_ssm.operands_kernel import operands_backward_kernel, operands_kernel
from phase1.ops.ar_ssm.reference import TAPS, Parameters
from phase1.ops.ar_ssm.sizes import Sizes, parameter_sizes, sizes_of
from phase1.ops.ar_ssm.sum_kernel import sums_of_rows
from phase1.ops.rotary.kernel import write_angles

GATE_ROWS = 32  # tokens of a tile of the gate
COLUMNS = 256  # of the convolution, at a time
FORWARD_ROWS = 8  # positions of a program in front of the core
PAIRS = 128  # of columns that are turned together, in a warp of a backward pass: one warp waits for no other
STRETCH, STRETCHES = 64, 2048  # those of a backward pass, or more where there are so many stretches
NORM_ROWS = 1  # of the gated norm's gradient, at a time: one warp holds a whole row
PROGRAMS = 264  # that add up the gradients of parameters


def _rows_of_a_stretch(s: Sizes) -> int:
    """Positions that a program of a backward pass in front of the core takes; few leave many sums behind."""
    rows = max(STRETCH, triton.next_power_of_2(triton.cdiv(s.B * s.T, STRETCHES)))
    return min(rows, s.T + TAPS)


def _gate_blocks(s: Sizes) -> dict[str, int]:
    pad = triton.next_power_of_2
    blocks = {"HEADS": pad(s.H), "RB": max(16, pad(s.R)), "NB": max(16, pad(max(1, s.N))), "BT": GATE_ROWS}
    return {"H": s.H, "R": s.R, "N": s.N, "FIXED": s.fixed, "FIRST": s.conv + s.H * s.P, **blocks}


def _operand_blocks(s: Sizes) -> dict[str, int]:
    pad = triton.next_power_of_2
    return {"H": s.H, "R": s.R, "P": s.P, "HEADS": pad(s.H), "HB": pad(s.R // 2), "BC": COLUMNS}


def forward(
    proj: Tensor, p: Parameters, past_conv: Tensor | None, past_S: Tensor | None, past_k: Tensor | None, past_x: Tensor | None,
    position: int, window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """The result of `operator.fused_forward`, of the same arguments, parameters together."""
    assert proj.stride(2) == 1
    s = sizes_of(proj, p.q_scale, p.state_scale, p.gate_weight)
    past = 0 if past_k is None else past_k.shape[2]
    L, half = past + s.T, partial(torch.empty, dtype=proj.dtype, device=proj.device)
    u, v = (half(s.B, s.H, s.T, s.R) for _ in range(2))
    q = half(s.B, s.H, s.T if window else 0, s.R)
    k = half(s.B, s.H, L if window else 0, s.R)
    x = half(s.B, s.H, L, s.P)
    if past_k is not None and past_x is not None:
        k[:, :, :past] = past_k
        x[:, :, :past] = past_x
    dt, log_a = (torch.empty(s.B, s.H, s.T, dtype=torch.float32, device=proj.device) for _ in range(2))
    gate = half(s.B, s.T, s.R)
    n = s.B * s.T
    gate_kernel[(triton.cdiv(n, GATE_ROWS),)](
        proj, p.dt_bias, p.A_log, p.gate_bias, p.gate_weight, p.gate_out, gate, dt, log_a, n, s.T, *proj.stride()[:2],
        1 / memory, **_gate_blocks(s), num_warps=4,
    )  # fmt: skip
    cos, sin = (torch.empty(s.T if window else 0, s.R // 2, dtype=torch.float32, device=proj.device) for _ in range(2))
    write_angles(cos, sin, position)
    operands_kernel[(triton.cdiv(s.T, FORWARD_ROWS), 2 + triton.cdiv(s.H * s.P, COLUMNS), s.B)](
        proj, past_conv if past_conv is not None else proj, p.conv_weight, p.conv_bias, p.q_scale, gate, cos, sin, u, v, q, k,
        x, s.T, L, FORWARD_ROWS, *proj.stride()[:2], eps, **_operand_blocks(s), PAST=past_conv is not None, WINDOWED=window > 0,
        num_warps=1,
    )  # fmt: skip
    core = core_forward(u, v, q, k, x, dt, log_a, p.state_scale, p.D, past_S, window, eps)
    D = s.H * s.P
    z, out = proj[..., s.conv : s.conv + D], half(s.B, s.T, D)
    rows = max(1, 2048 // triton.next_power_of_2(D))
    gated_norm_kernel[(triton.cdiv(n, rows),)](
        core.y, z, p.norm, out, n, s.T, proj.stride(0), proj.stride(1), eps,
        D=D, DB=triton.next_power_of_2(D), ROWS=rows, num_warps=4,
    )  # fmt: skip
    total = proj.new_empty(0, dtype=torch.float32) if core.total is None else core.total
    return [out, gate.mean(dtype=torch.float32), core.states, k, x, gate, u, v, q, dt, log_a, core.y, core.lse, total, cos, sin]


def backward(
    d_out: Tensor, d_mean: Tensor | None, d_last: Tensor | None, d_k: Tensor | None, d_x: Tensor | None,
    proj: Tensor, p: Parameters, past_conv: Tensor | None, past_S: Tensor | None, past: int, gate: Tensor, saved: list[Tensor],
    window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """The result of `operator.fused_backward`, of the same arguments, parameters together."""
    states, k, x, u, v, q, dt, log_a, y, lse, total, cos, sin = saved
    s = sizes_of(proj, p.q_scale, p.state_scale, p.gate_weight)
    D, n, L = s.H * s.P, s.B * s.T, x.shape[2]
    wide = partial(torch.empty, dtype=torch.float32, device=proj.device)
    d_proj = torch.empty_like(proj, memory_format=torch.contiguous_format)
    strides = proj.stride(0), proj.stride(1), d_proj.stride(0), d_proj.stride(1)
    z, dz = proj[..., s.conv : s.conv + D], d_proj[..., s.conv : s.conv + D]
    dy, rows = torch.empty_like(y), NORM_ROWS
    norm_sums = wide(min(triton.cdiv(n, rows), 8 * PROGRAMS), D)
    gated_norm_backward_kernel[(len(norm_sums),)](
        y, z, p.norm, d_out.contiguous(), dy, dz, norm_sums, n, s.T, *strides, eps,
        D=D, DB=triton.next_power_of_2(D), ROWS=rows, num_warps=1,
    )  # fmt: skip
    core = Core(y, states, lse, total if total.numel() else None)
    d_last = None if d_last is None else d_last.contiguous()  # a compiler may lay it out as it likes
    g = core_backward(dy, d_last, u, v, q, k, x, dt, log_a, p.state_scale, p.D, past_S, core, window, eps)
    if d_k is not None:
        g.k.add_(d_k)
    if d_x is not None:
        g.x.add_(d_x)
    sizes = parameter_sizes(s)
    first, rows = past_conv if past_conv is not None else proj, _rows_of_a_stretch(s)
    d_past = torch.empty_like(past_conv) if past_conv is not None else proj.new_empty(0)
    stretches = triton.cdiv(s.T + (TAPS - 1 if past_conv is not None else 0), rows)
    scale_sums, conv_sums = wide(s.B * stretches, s.H * s.R), wide(s.B * stretches, (TAPS + 1) * s.conv)
    d_gate_u, d_gate_v = (wide(s.B, s.T, s.R) for _ in range(2))
    blocks = _operand_blocks(s)
    warps = min(8, max(1, blocks["HEADS"] * blocks["HB"] // PAIRS))
    operands_backward_kernel[(stretches, 2 + triton.cdiv(D, COLUMNS), s.B)](
        proj, first, p.conv_weight, p.conv_bias, p.q_scale, gate, cos, sin, g.u, g.v, g.q, g.k, g.x, d_gate_u, d_gate_v,
        d_proj, d_past, scale_sums, conv_sums, s.T, L, *strides, rows, eps, **blocks, PAST=past_conv is not None,
        WINDOWED=window > 0, num_warps=warps,
    )  # fmt: skip
    gate_sums = wide(min(triton.cdiv(n, GATE_ROWS), PROGRAMS), sum(sizes[3:8]))
    gate_backward_kernel[(len(gate_sums),)](
        proj, p.dt_bias, p.A_log, p.gate_bias, p.gate_weight, gate, g.dt, g.log_a, d_gate_u, d_gate_v,
        d_mean if d_mean is not None else proj, 1 / max(1, n * s.R), d_proj, gate_sums, n, s.T, *strides, **_gate_blocks(s),
        TOTAL=sum(sizes[3:8]), MEAN_USED=d_mean is not None, num_warps=4,
        num_stages=3 if s.R <= 64 else 1,  # Ampere and Ada have 99 KiB of shared memory
    )  # fmt: skip
    flat = sums_of_rows((conv_sums, scale_sums, gate_sums, norm_sums, g.scale_and_skip))
    if not window:
        flat[sum(sizes[:2]) : sum(sizes[:3])].zero_()
    grads = [d_proj, flat, d_past]
    none = proj.new_empty(0)
    grads.append(proj.new_empty(0) if g.state is None else g.state.clone())
    grads.append(g.k[:, :, :past].clone() if window and past else proj.new_empty(0))
    grads.append(g.x[:, :, :past].clone() if past else none)
    return grads
