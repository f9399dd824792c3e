"""Launches the core's kernels: y = c ⊙ rms(semiseparable) + window attention + D x, its state, and all gradients."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from phase1.ops.ar_ssm import core_kernel as kernels
from phase1.ops.ar_ssm.sizes import plan, span_of


@dataclass(frozen=True)
class Launch:
    """How one kernel runs: positions of a chunk, of the window at a time, warps, and stages of its software pipeline."""

    chunk: int
    keys: int
    warps: int
    stages: int

    def near(self, window: int) -> dict[str, int]:
        return {"KB": self.keys, "NK": triton.cdiv(self.chunk + max(window, 1) - 1, self.keys)}

    def options(self) -> dict[str, int]:
        return {"C": self.chunk, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Launches:
    """How each kernel of the core is launched."""

    state: Launch
    forward: Launch
    far_u: Launch
    near_q: Launch
    near_keys: Launch
    far_v: Launch


class Core(NamedTuple):
    """The result of the forward pass, and what the backward pass needs besides the operands."""

    y: Tensor  # (B, T, H, P)
    states: Tensor  # (B·H, NS + 1, R, P) before each stretch, and the final one
    lse: Tensor  # (B, H, T) log2 of the window's normaliser
    total: Tensor | None  # (B·H, NS) log2 of the decay of each stretch


class Gradients(NamedTuple):
    """Gradients of all operands of the core; d_state is None without a given state."""

    u: Tensor
    v: Tensor
    q: Tensor
    k: Tensor
    x: Tensor
    dt: Tensor
    log_a: Tensor
    scale_and_skip: Tensor  # (B·NS, H P + H), to be summed
    state: Tensor | None


def launches_for(R: int, P: int, dtype: torch.dtype) -> Launches:
    """The fastest found on an H200 at heads of 64; larger heads and float32 take blocks that fit other cards' memory too."""
    if dtype == torch.float32 or R > 64 or P > 64:
        return Launches(*[Launch(16, 16, 4, 1)] * 6)
    near_q, near_keys = Launch(64, 32, 4, 3), Launch(64, 16, 4, 3)
    wide, narrow = Launch(32, 32, 4, 2), Launch(32, 32, 2, 2)
    if R > 32:
        return Launches(wide, wide, wide, near_q, near_keys, Launch(16, 16, 2, 2))
    return Launches(wide, narrow, Launch(32, 32, 2, 3), near_q, near_keys, narrow)


def _axes(R: int, P: int) -> dict[str, int]:
    """Ranks and channels, and the blocks that hold them: a product takes 16 or more."""
    return {"R": R, "P": P, "RB": max(16, triton.next_power_of_2(R)), "PB": max(16, triton.next_power_of_2(P))}


def core_forward(
    u: Tensor, v: Tensor, q: Tensor, k: Tensor, x: Tensor, dt: Tensor, log_a: Tensor, scale: Tensor, skip: Tensor,
    state: Tensor | None, window: int, eps: float, launches: Launches | None = None,
) -> Core:  # fmt: skip
    """The result, for contiguous operands laid out as `core_kernel` says; `state` is S before the first position."""
    B, H, T, R = u.shape
    L, P = x.shape[2:]
    launches = launches or launches_for(R, P, x.dtype)
    NS, span = plan(B, T, H)
    axes = _axes(R, P)
    wide = partial(torch.empty, dtype=torch.float32, device=x.device)
    states = wide(B * H, NS + 1, R, P)
    total = None
    if NS > 1:
        added, total = wide(B * H, NS, R, P), wide(B * H, NS)
        run = launches.state
        kernels.state_kernel[(NS, B * H)](
            v, x, dt, log_a, added, total, T, L, NS, **axes, NC=span // run.chunk, **run.options()
        )
        _carry(added, total, state, states, reverse=False)
    elif state is not None:
        states[:, 0] = state.view(B * H, R, P)
    y, lse = torch.empty(B, T, H, P, dtype=x.dtype, device=x.device), wide(B, H, T if window else 0)
    run = launches.forward
    kernels.forward_kernel[(NS, B * H)](
        u, v, q, k, x, dt, log_a, scale, skip, states, y, lse, T, L, NS, window,
        int(NS > 1 or state is not None), eps, H=H, **axes,
        NC=span // run.chunk, **run.near(window), WINDOWED=window > 0, **run.options(),
    )  # fmt: skip
    return Core(y, states, lse, total)


def core_backward(
    dy: Tensor, d_last: Tensor | None,
    u: Tensor, v: Tensor, q: Tensor, k: Tensor, x: Tensor, dt: Tensor, log_a: Tensor, scale: Tensor, skip: Tensor,
    state: Tensor | None, saved: Core, window: int, eps: float, launches: Launches | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of all operands for those of y, `dy` (B, T, H, P), and of the final state, `d_last` (B, H, R, P) or None."""
    B, H, T, R = u.shape
    L, P = x.shape[2:]
    launches = launches or launches_for(R, P, x.dtype)
    NS = saved.states.shape[1] - 1
    span = span_of(T, NS)
    axes = _axes(R, P)
    wide = partial(torch.empty, dtype=torch.float32, device=x.device)
    du, dv, dq, dk, dx = (torch.empty_like(tensor) for tensor in (u, v, q, k, x))
    d_dt, d_log_a, uw, delta = (wide(B, H, T) for _ in range(4))
    df = torch.empty(B, H, T, P, dtype=x.dtype, device=x.device)
    sums = wide(B * NS, H * P + H)
    carried = NS > 1 or state is not None
    d_added = wide(B * H if carried else 0, NS, R, P)
    run = launches.far_u
    kernels.far_backward_u_kernel[(NS, B * H)](
        u, v, x, dt, log_a, scale, saved.states, dy, df, du, uw, d_added, sums, T, L, NS, int(carried), eps, H=H, **axes,
        NC=span // run.chunk, CARRIED=carried, **run.options(),
    )  # fmt: skip
    ends = carried or d_last is not None
    d_states = wide(B * H, NS + 1, R, P) if ends else saved.states  # not read without any
    if carried:
        total = saved.total
        if total is None:
            total = log_a.clamp_min(kernels.LOWEST.value).sum(-1).view(-1, 1) * kernels.LOG2E.value
        _carry(d_added, total, d_last, d_states, reverse=True)
    elif d_last is not None:
        d_states[:, 1] = d_last.view(B * H, R, P)
    if window:
        run = launches.near_q
        grid = (triton.cdiv(T, run.chunk), B * H)
        kernels.near_backward_q_kernel[grid](
            q, k, x, dy, saved.lse, delta, dq, T, L, window, H=H, **axes, **run.near(window), **run.options()
        )
        run = launches.near_keys
        grid = (triton.cdiv(L, run.chunk), B * H)
        kernels.near_backward_keys_kernel[grid](
            q, k, x, dy, skip, saved.lse, delta, dk, dx, T, L, window, H=H, **axes, **run.near(window), **run.options()
        )
    run = launches.far_v
    kernels.far_backward_v_kernel[(NS, B * H)](
        u, v, x, dt, log_a, skip, saved.states, d_states, dy, df, uw, dv, dx,
        d_dt, d_log_a, sums, T, L, NS, int(ends), H=H, **axes, NC=span // run.chunk, ADD=window > 0,
        **run.options(),
    )  # fmt: skip
    d_state = None if state is None else d_states[:, 0].view_as(state)
    return Gradients(du, dv, dq, dk, dx, d_dt, d_log_a, sums, d_state)


def _carry(added: Tensor, total: Tensor, first: Tensor | None, states: Tensor, reverse: bool) -> None:
    n, NS, R, P = added.shape
    cols = min(64, triton.next_power_of_2(R * P))
    kernels.carry_kernel[(triton.cdiv(R * P, cols), n)](
        added, total, first, states, NS,
        HAS_FIRST=first is not None, RP=R * P, ROWS=min(32, triton.next_power_of_2(NS)), COLS=cols, REVERSE=reverse,
        num_warps=4,
    )  # fmt: skip
