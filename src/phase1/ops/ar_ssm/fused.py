"""The mixer between its two projections as one operator of Triton kernels, with its gradient."""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from phase1.ops.ar_ssm.core import Core, core_backward, core_forward, plan
from phase1.ops.ar_ssm.gate_kernel import gate_backward_kernel, gate_kernel
from phase1.ops.ar_ssm.gated_norm_kernel import gated_norm_backward_kernel, gated_norm_kernel
from phase1.ops.ar_ssm.operands_kernel import conv_backward_kernel, operands_backward_kernel, operands_kernel
from phase1.ops.ar_ssm.reference import TAPS
from phase1.ops.ar_ssm.sum_kernel import sums_of_rows
from phase1.ops.rotary.kernel import write_angles

GATE_ROWS = 32  # tokens of a tile of the gate
COLUMNS = 256  # of the convolution, at a time
FORWARD_ROWS = 8  # positions of a program in front of the core
STRETCH, STRETCHES = 32, 2048  # those of a backward pass, or more where there are so many stretches
NORM_ROWS = 2  # of the gated norm's gradient, at a time: one warp holds a whole row
PROGRAMS = 264  # that add up the gradients of parameters
ANY_ROWS = (torch.Tag.flexible_layout,)  # without it a compiler that aligns rows to 128 bytes copies proj, twice a layer


class Sizes(NamedTuple):
    """The sizes of a call, also those that no tensor's shape gives."""

    B: int
    T: int
    H: int
    R: int
    P: int
    N: int
    fixed: int

    @property
    def conv(self) -> int:
        return self.H * (self.P + 2 * self.R)


def _sizes(proj: Tensor, q_scale: Tensor, state_scale: Tensor, gate_weight: Tensor | None) -> Sizes:
    (H, R), P = q_scale.shape, state_scale.shape[1]
    N, fixed = (0, R) if gate_weight is None else (gate_weight.shape[1], R - gate_weight.shape[0])
    return Sizes(proj.shape[0], proj.shape[1], H, R, P, N, fixed)


def _rows_of_a_stretch(s: Sizes) -> int:
    """Positions that a program of a backward pass in front of the core takes, a multiple of 4; few leave many sums behind."""
    rows = max(STRETCH, triton.next_power_of_2(triton.cdiv(s.B * s.T, STRETCHES)))
    return min(rows, triton.cdiv(s.T + TAPS, 4) * 4)


def _gate_blocks(s: Sizes) -> dict[str, int]:
    pad = triton.next_power_of_2
    blocks = {"HEADS": pad(s.H), "RB": max(16, pad(s.R)), "NB": max(16, pad(max(1, s.N))), "BT": GATE_ROWS}
    return {"H": s.H, "R": s.R, "N": s.N, "FIXED": s.fixed, "FIRST": s.conv + s.H * s.P, **blocks}


def _operand_blocks(s: Sizes) -> dict[str, int]:
    pad = triton.next_power_of_2
    return {"H": s.H, "R": s.R, "P": s.P, "HEADS": pad(s.H), "HB": pad(s.R // 2), "BC": COLUMNS}


@torch.library.custom_op("phase1::ar_ssm", mutates_args=(), tags=ANY_ROWS)
def fused_forward(
    proj: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, skip: Tensor, q_scale: Tensor,
    state_scale: Tensor, norm: Tensor, gate_bias: Tensor | None, gate_weight: Tensor | None, gate_out: Tensor | None,
    past_conv: Tensor | None, past_S: Tensor | None, past_k: Tensor | None, past_x: Tensor | None,
    position: int, window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """out, mean of the gate, states, k, x and what the backward pass needs: gate, u, v, q, dt, log_a, y, lse, total, cos, sin.

    `position` is that of the first row; `past_*` is what the rows before it left, keys and values (B, H, past, ·).
    """
    assert proj.stride(2) == 1
    s = _sizes(proj, q_scale, state_scale, gate_weight)
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
        proj, dt_bias, A_log, gate_bias, gate_weight, gate_out, gate, dt, log_a, n, s.T, *proj.stride()[:2], 1 / memory,
        **_gate_blocks(s), num_warps=4,
    )  # fmt: skip
    cos, sin = (torch.empty(s.T if window else 0, s.R // 2, dtype=torch.float32, device=proj.device) for _ in range(2))
    write_angles(cos, sin, position)
    operands_kernel[(triton.cdiv(s.T, FORWARD_ROWS), 2 + triton.cdiv(s.H * s.P, COLUMNS), s.B)](
        proj, past_conv if past_conv is not None else proj, conv_weight, conv_bias, q_scale, gate, cos, sin, u, v, q, k, x,
        s.T, L, FORWARD_ROWS, *proj.stride()[:2], eps, **_operand_blocks(s), PAST=past_conv is not None, WINDOWED=window > 0,
        num_warps=1,
    )  # fmt: skip
    core = core_forward(u, v, q, k, x, dt, log_a, state_scale, skip, past_S, window, eps)
    D = s.H * s.P
    z, out = proj[..., s.conv : s.conv + D], half(s.B, s.T, D)
    rows = max(1, 2048 // triton.next_power_of_2(D))
    gated_norm_kernel[(triton.cdiv(n, rows),)](
        core.y, z, norm, out, n, s.T, proj.stride(0), proj.stride(1), eps,
        D=D, DB=triton.next_power_of_2(D), ROWS=rows, num_warps=4,
    )  # fmt: skip
    total = proj.new_empty(0, dtype=torch.float32) if core.total is None else core.total
    return [out, gate.mean(dtype=torch.float32), core.states, k, x, gate, u, v, q, dt, log_a, core.y, core.lse, total, cos, sin]


@torch.library.custom_op("phase1::ar_ssm_backward", mutates_args=(), tags=ANY_ROWS)
def fused_backward(
    d_out: Tensor, d_mean: Tensor | None, d_last: Tensor | None, d_k: Tensor | None, d_x: Tensor | None,
    proj: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, skip: Tensor, q_scale: Tensor,
    state_scale: Tensor, norm: Tensor, gate_bias: Tensor | None, gate_weight: Tensor | None, gate_out: Tensor | None,
    past_conv: Tensor | None, past_S: Tensor | None, past: int, gate: Tensor, saved: list[Tensor],
    window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of proj; of all parameters, one after the other as `parameter_sizes` says; of the past (empty without one)."""
    states, k, x, u, v, q, dt, log_a, y, lse, total, cos, sin = saved
    s = _sizes(proj, q_scale, state_scale, gate_weight)
    D, n, L = s.H * s.P, s.B * s.T, x.shape[2]
    wide = partial(torch.empty, dtype=torch.float32, device=proj.device)
    d_proj = torch.empty_like(proj, memory_format=torch.contiguous_format)
    strides = proj.stride(0), proj.stride(1), d_proj.stride(0), d_proj.stride(1)
    z, dz = proj[..., s.conv : s.conv + D], d_proj[..., s.conv : s.conv + D]
    dy, rows = torch.empty_like(y), NORM_ROWS
    norm_sums = wide(min(triton.cdiv(n, rows), 8 * PROGRAMS), D)
    gated_norm_backward_kernel[(len(norm_sums),)](
        y, z, norm, d_out.contiguous(), dy, dz, norm_sums, n, s.T, *strides, eps,
        D=D, DB=triton.next_power_of_2(D), ROWS=rows, num_warps=1,
    )  # fmt: skip
    core = Core(y, states, lse, total if total.numel() else None)
    d_last = None if d_last is None else d_last.contiguous()  # a compiler may lay it out as it likes
    g = core_backward(dy, d_last, u, v, q, k, x, dt, log_a, state_scale, skip, past_S, core, window, eps)
    if d_k is not None:
        g.k.add_(d_k)
    if d_x is not None:
        g.x.add_(d_x)
    sizes = parameter_sizes(s)
    first, rows = past_conv if past_conv is not None else proj, _rows_of_a_stretch(s)
    stretches = triton.cdiv(s.T, rows)
    scale_sums = wide(s.B * stretches, s.H * s.R)
    d_gate_u, d_gate_v = (wide(s.B, s.T, s.R) for _ in range(2))
    operands_backward_kernel[(stretches, 2 + triton.cdiv(D, COLUMNS), s.B)](
        proj, first, conv_weight, conv_bias, q_scale, gate, cos, sin, g.u, g.v, g.q, g.k, g.x, d_gate_u, d_gate_v, scale_sums,
        s.T, L, *strides[:2], rows, eps, **_operand_blocks(s), PAST=past_conv is not None, WINDOWED=window > 0, num_warps=1,
    )  # fmt: skip
    gate_sums = wide(min(triton.cdiv(n, GATE_ROWS), PROGRAMS), sum(sizes[3:8]))
    gate_backward_kernel[(len(gate_sums),)](
        proj, dt_bias, A_log, gate_bias, gate_weight, gate, g.dt, g.log_a, d_gate_u, d_gate_v,
        d_mean if d_mean is not None else proj, 1 / max(1, n * s.R), d_proj, gate_sums, n, s.T, *strides, **_gate_blocks(s),
        TOTAL=sum(sizes[3:8]), MEAN_USED=d_mean is not None, num_warps=4,
        num_stages=3 if s.R <= 64 else 1,  # Ampere and Ada have 99 KiB of shared memory
    )  # fmt: skip
    d_past = torch.empty_like(past_conv) if past_conv is not None else proj.new_empty(0)
    stretches = triton.cdiv(s.T + (TAPS - 1 if past_conv is not None else 0), rows)
    conv_sums = wide(s.B * stretches, (TAPS + 1) * s.conv)
    columns = triton.cdiv(D, COLUMNS) + 2 * triton.cdiv(s.H * s.R, COLUMNS)
    conv_backward_kernel[(stretches, columns, s.B)](
        g.u, g.v, g.x, proj, first, d_proj, d_past, conv_weight, conv_sums, s.T, L, rows, *strides,
        H=s.H, R=s.R, P=s.P, BC=COLUMNS, PAST=past_conv is not None, num_warps=1,
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


def parameter_sizes(s: Sizes) -> list[int]:
    """Sizes of the flat gradients: taps, bias, q_scale, dt_bias, A_log, W (transposed, with the fixed ranks), c (with them), b,
    norm, scale and D."""
    D = s.H * s.P
    return [TAPS * s.conv, s.conv, s.H * s.R, s.H, s.H, s.N * s.R, s.R if s.N else 0, s.N, D, D, s.H]


def parameter_gradients(flat: Tensor, s: Sizes) -> list[Tensor | None]:
    """Gradients by parameter: taps, bias, dt_bias, A_log, D, q_scale, state_scale, norm, and b, W, c of the gate (or None)."""
    taps, bias, q_scale, dt_bias, A_log, W, c, b, norm, scale, skip = flat.split(parameter_sizes(s))
    gate = [b, W.view(s.N, s.R)[:, s.fixed :].T, c[s.fixed :]] if s.N else [None] * 3
    shaped = [taps.view(TAPS, s.conv), bias, dt_bias, A_log, skip, q_scale.view(s.H, s.R), scale.view(s.H, s.P), norm]
    return [*shaped, *gate]


@fused_forward.register_fake
def _(
    proj: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, skip: Tensor, q_scale: Tensor,
    state_scale: Tensor, norm: Tensor, gate_bias: Tensor | None, gate_weight: Tensor | None, gate_out: Tensor | None,
    past_conv: Tensor | None, past_S: Tensor | None, past_k: Tensor | None, past_x: Tensor | None,
    position: int, window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    s = _sizes(proj, q_scale, state_scale, gate_weight)
    L = s.T + (0 if past_x is None else past_x.shape[2])
    NS, _ = plan(s.B, s.T, s.H)
    T, L_k = (s.T, L) if window else (0, 0)
    rest = [(s.B, s.H, L_k, s.R), (s.B, s.H, L, s.P), (s.B, s.H, s.T, s.R), (s.B, s.H, s.T, s.R), (s.B, s.H, T, s.R)]
    wide = [(s.B, s.H, s.T), (s.B, s.H, s.T)]
    out, gate = proj.new_empty(s.B, s.T, s.H * s.P), proj.new_empty(s.B, s.T, s.R)
    states = proj.new_empty(s.B * s.H, NS + 1, s.R, s.P, dtype=torch.float32)
    k, x, u, v, q = (proj.new_empty(shape) for shape in rest)
    dt, log_a = (proj.new_empty(shape, dtype=torch.float32) for shape in wide)
    y = proj.new_empty(s.B, s.T, s.H, s.P)
    lse = proj.new_empty(s.B, s.H, T, dtype=torch.float32)
    total = proj.new_empty((s.B * s.H, NS) if NS > 1 else 0, dtype=torch.float32)
    cos, sin = (proj.new_empty(T, s.R // 2, dtype=torch.float32) for _ in range(2))
    return [out, proj.new_empty((), dtype=torch.float32), states, k, x, gate, u, v, q, dt, log_a, y, lse, total, cos, sin]


@fused_backward.register_fake
def _(
    d_out: Tensor, d_mean: Tensor | None, d_last: Tensor | None, d_k: Tensor | None, d_x: Tensor | None,
    proj: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, skip: Tensor, q_scale: Tensor,
    state_scale: Tensor, norm: Tensor, gate_bias: Tensor | None, gate_weight: Tensor | None, gate_out: Tensor | None,
    past_conv: Tensor | None, past_S: Tensor | None, past: int, gate: Tensor, saved: list[Tensor],
    window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    s = _sizes(proj, q_scale, state_scale, gate_weight)
    d_past = proj.new_empty(0) if past_conv is None else torch.empty_like(past_conv)
    d_S = proj.new_empty(0) if past_S is None else torch.empty_like(past_S)
    d_k = proj.new_empty((s.B, s.H, past, s.R) if window and past else 0)
    d_x = proj.new_empty((s.B, s.H, past, s.P) if past else 0)
    return [proj.new_empty(proj.shape), proj.new_empty(sum(parameter_sizes(s)), dtype=torch.float32), d_past, d_S, d_k, d_x]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, _, ctx.window, ctx.memory, ctx.eps = inputs
    past_k = tensors[14]
    ctx.past = 0 if past_k is None else past_k.shape[2]
    ctx.save_for_backward(*tensors[:14], *output[2:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    d_out, d_mean, d_states, d_k, d_x, *unused = grads
    assert all(grad is None for grad in unused), "results that only the backward pass uses have gradients"
    tensors = ctx.saved_tensors  # once: recomputation unpacks them once
    (proj, *rest), (states, k, x, gate, *saved) = tensors[:14], tensors[14:]
    conv, S = rest[11], rest[12]
    s = _sizes(proj, rest[5], rest[6], rest[9])
    d_last = None if d_states is None else d_states[:, -1].contiguous()
    d_out = torch.zeros_like(saved[5]).flatten(2) if d_out is None else d_out
    window = (ctx.window, ctx.memory, ctx.eps)
    d_proj, flat, d_conv, d_S, d_k, d_x = fused_backward(
        d_out, d_mean, d_last, d_k, d_x, proj, *rest, ctx.past, gate, [states, k, x, *saved], *window
    )
    past = [d_conv if conv is not None else None, d_S if S is not None else None]
    past += [d_k if ctx.past else None, d_x if ctx.past else None]
    return (d_proj, *parameter_gradients(flat, s), *past, None, None, None, None)


fused_forward.register_autograd(_backward, setup_context=_save)
