"""The mixer between its two projections as operators of PyTorch, which need no Triton before they are run."""

from typing import Any

import torch
from torch import Tensor

from phase1.ops.ar_ssm.reference import TAPS, Parameters
from phase1.ops.ar_ssm.sizes import Sizes, parameter_sizes, plan, sizes_of

ANY_ROWS = (torch.Tag.flexible_layout,)  # without it a compiler that aligns rows to 128 bytes copies proj, twice a layer


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
    from phase1.ops.ar_ssm.fused import forward  # Triton takes a second to import

    p = Parameters(conv_weight, conv_bias, dt_bias, A_log, skip, q_scale, state_scale, norm, gate_bias, gate_weight, gate_out)
    return forward(proj, p, past_conv, past_S, past_k, past_x, position, window, memory, eps)


@torch.library.custom_op("phase1::ar_ssm_backward", mutates_args=(), tags=ANY_ROWS)
def fused_backward(
    d_out: Tensor, d_mean: Tensor | None, d_last: Tensor | None, d_k: Tensor | None, d_x: Tensor | None,
    proj: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, skip: Tensor, q_scale: Tensor,
    state_scale: Tensor, norm: Tensor, gate_bias: Tensor | None, gate_weight: Tensor | None, gate_out: Tensor | None,
    past_conv: Tensor | None, past_S: Tensor | None, past: int, gate: Tensor, saved: list[Tensor],
    window: int, memory: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of proj; of all parameters, one after the other as `parameter_sizes` says; of the past (empty without one)."""
    from phase1.ops.ar_ssm.fused import backward  # Triton takes a second to import

    p = Parameters(conv_weight, conv_bias, dt_bias, A_log, skip, q_scale, state_scale, norm, gate_bias, gate_weight, gate_out)
    given = d_out, d_mean, d_last, d_k, d_x
    return backward(*given, proj, p, past_conv, past_S, past, gate, saved, window, memory, eps)


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
    s = sizes_of(proj, q_scale, state_scale, gate_weight)
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
    s = sizes_of(proj, q_scale, state_scale, gate_weight)
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
    s = sizes_of(proj, rest[5], rest[6], rest[9])
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
