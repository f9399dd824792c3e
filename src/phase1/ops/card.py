"""Whether the card of a tensor runs this package's Triton kernels."""

from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = 8  # compute capability, major: Ampere's asynchronous copies, and products of bfloat16 and float32
HAS_TRITON = find_spec("triton") is not None


def runs_kernels(tensor: Tensor) -> bool:
    """True on a GPU of Ampere or newer, where Triton is there; a constant of a compiled graph."""
    return HAS_TRITON and tensor.is_cuda and torch.cuda.get_device_properties(tensor.device).major >= OLDEST
