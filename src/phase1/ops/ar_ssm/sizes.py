"""Sizes of the mixer's kernels: what is known of a call without Triton, which its estimate of memory does not need."""

from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from phase1.ops.ar_ssm.reference import TAPS

SHORTEST = 64  # positions of a stretch: a multiple of every chunk
PROGRAMS = ContextVar("programs", default=528)
"""Stretches that run beside each other, about: four for each of 132 multiprocessors."""


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


def sizes_of(proj: Tensor, q_scale: Tensor, state_scale: Tensor, gate_weight: Tensor | None) -> Sizes:
    """From the shapes of the projection and of parameters."""
    (H, R), P = q_scale.shape, state_scale.shape[1]
    N, fixed = (0, R) if gate_weight is None else (gate_weight.shape[1], R - gate_weight.shape[0])
    return Sizes(proj.shape[0], proj.shape[1], H, R, P, N, fixed)


def parameter_sizes(s: Sizes) -> list[int]:
    """Sizes of the flat gradients: taps, bias, q_scale, dt_bias, A_log, W (transposed, with the fixed ranks), c (with them), b,
    norm, scale and D."""
    D = s.H * s.P
    return [TAPS * s.conv, s.conv, s.H * s.R, s.H, s.H, s.N * s.R, s.R if s.N else 0, s.N, D, D, s.H]


def plan(B: int, T: int, H: int) -> tuple[int, int]:
    """Stretches, and positions in each: a power of 2, so that few variants of a kernel are compiled."""
    span = span_of(T, max(1, min(cdiv(T, SHORTEST), PROGRAMS.get() // (B * H))))
    return cdiv(T, span), span


def span_of(T: int, stretches: int) -> int:
    """Positions in each of as many stretches or fewer; the same for the number of those that there are."""
    return max(SHORTEST, power_of_2(cdiv(T, stretches)))


def cdiv(n: int, size: int) -> int:
    """Parts of `size` that hold n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of 2 that is n or more, for n of 1 or more."""
    return 1 << (n - 1).bit_length()
