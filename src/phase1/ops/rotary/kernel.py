"""The angles of rotary position embeddings as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64


@triton.jit
def angle_of(position, j, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """position · 10000^(-j / HALF) without its full turns, float32; float64 inside."""
    turns = tl.exp2(j.to(tl.float64) * (-13.287712379549449 / HALF)) * 0.15915494309189535  # a position, in full turns
    angle = position.to(tl.float64) * turns
    return ((angle - tl.floor(angle)) * 6.283185307179586).to(tl.float32)


@triton.jit(do_not_specialize=["start", "T"])
def _angles(cos, sin, start, T, HALF: tl.constexpr, HB: tl.constexpr, BT: tl.constexpr):  # type: ignore[no-untyped-def]
    t, j = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HB)
    mask = (t < T)[:, None] & (j < HALF)[None, :]
    angle = angle_of((start + t)[:, None], j[None, :], HALF)
    o = t[:, None] * HALF + j[None, :]
    tl.store(cos + o, tl.cos(angle), mask=mask)
    tl.store(sin + o, tl.sin(angle), mask=mask)


def rotary_angles_kernel(like: Tensor, length: int, half: int, start: int) -> tuple[Tensor, Tensor]:
    """Triton form of `rotary_angles_reference`: same arguments and results, in float32."""
    cos, sin = (torch.empty(length, half, dtype=torch.float32, device=like.device) for _ in range(2))
    write_angles(cos, sin, start)
    return cos, sin


def write_angles(cos: Tensor, sin: Tensor, start: int) -> None:
    """Fill `cos` and `sin`, contiguous (T, R/2) float32, from position `start` on."""
    T, half = cos.shape
    if T:
        _angles[(triton.cdiv(T, ROWS),)](cos, sin, start, T, HALF=half, HB=triton.next_power_of_2(half), BT=ROWS)
