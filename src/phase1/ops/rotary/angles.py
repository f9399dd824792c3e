"""Cosines and sines of rotary position embeddings. Inlined, a compiler would compute them anew for every batch and head."""

from importlib.util import find_spec

import torch
from torch import Tensor

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
"""Fast form of `rotary_angles_reference`: same arguments and results; one kernel on a GPU, if Triton is there."""


@rotary_angles.register_fake
def _(like: Tensor, length: int, half: int, start: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(like.dtype, torch.float32)
    cos, sin = (like.new_empty(length, half, dtype=wide) for _ in range(2))
    return cos, sin


rotary_angles.register_autograd(lambda ctx, d_cos, d_sin: (None, None, None, None))


if find_spec("triton"):

    @rotary_angles.register_kernel("cuda")
    def _(like: Tensor, length: int, half: int, start: int) -> tuple[Tensor, Tensor]:
        if like.dtype == torch.float64:
            return rotary_angles_reference(like, length, half, start)
        from phase1.ops.rotary.kernel import write_angles  # Triton takes a second to import

        cos, sin = (torch.empty(length, half, dtype=torch.float32, device=like.device) for _ in range(2))
        write_angles(cos, sin, start)
        return cos, sin
