"""Cosines and sines of rotary position embeddings. Inlined, a compiler would compute them anew for every batch and head."""

from collections.abc import Callable

import torch
from torch import Tensor

from phase1.ops.card import runs_kernels

BASE = 10000.0


def rotary_angles_reference(like: Tensor, length: int, half: int, start: int) -> tuple[Tensor, Tensor]:
    """cos and sin of (start + t) · 10000^(-j / half), (length, half) each, on the device of `like`, float64 if that is.

    They are float32 otherwise. Angles are float64 inside: in float32 those of far positions are off by their rounding.

    Source: Su et al. 2021, "RoFormer", section 3.2.
    """
    exact = {"device": like.device, "dtype": torch.float64}
    frequency = BASE ** (torch.arange(half, **exact) / -half)  # type: ignore[call-overload]
    position = start + torch.arange(length, **exact)  # type: ignore[call-overload]  # `start` may be a tensor: it is not read
    angle = position[:, None] * frequency
    wide = torch.promote_types(like.dtype, torch.float32)
    return angle.cos().to(wide), angle.sin().to(wide)


rotary_angles = torch.library.custom_op("phase1::rotary_angles", rotary_angles_reference, mutates_args=())
"""Fast form of `rotary_angles_reference`: same arguments and results; one kernel on a GPU that runs it."""


@rotary_angles.register_fake
def _(like: Tensor, length: int, half: int, start: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(like.dtype, torch.float32)
    cos, sin = (like.new_empty(length, half, dtype=wide) for _ in range(2))
    return cos, sin


# Angles have no gradient: with one, autograd would keep all that they are multiplied by.
rotary_angles.register_autograd(
    lambda ctx, d_cos, d_sin: (None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
)


@rotary_angles.register_kernel("cuda")
def _(like: Tensor, length: int, half: int, start: int) -> tuple[Tensor, Tensor]:
    return _form(like)(like, length, half, start)


def _form(like: Tensor) -> Callable[[Tensor, int, int, int], tuple[Tensor, Tensor]]:
    """The kernel or the definition, whichever can compute in such a type where `like` is."""
    if like.dtype == torch.float64 or not runs_kernels(like):
        return rotary_angles_reference
    from phase1.ops.rotary.kernel import rotary_angles_kernel  # Triton takes a second to import

    return rotary_angles_kernel
