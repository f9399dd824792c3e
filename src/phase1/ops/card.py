"""Whether the card of a tensor runs this package's Triton kernels."""

from importlib.util import find_spec

import torch
from torch import Tensor

from phase1.ops import self_check

OLDEST = 8  # compute capability, major: Ampere's asynchronous copies, and products of bfloat16 and float32
HAS_TRITON = find_spec("triton") is not None


def is_recent(tensor: Tensor) -> bool:
    """True on a GPU of Ampere or newer, where Triton is there; a constant of a compiled graph."""
    return HAS_TRITON and tensor.is_cuda and torch.cuda.get_device_properties(tensor.device).major >= OLDEST


def runs_kernels(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """True on such a GPU if the kernels have passed their check there; while a graph is captured an earlier answer counts.

    Not of AR-SSM, which has a check for its sizes. `dtype`: of their products, that of the tensor by default.
    """
    dtype = dtype or tensor.dtype
    if not is_recent(tensor):
        return False
    if torch.cuda.is_current_stream_capturing():
        return self_check.KERNELS not in self_check.DISPROVEN
    return dtype not in self_check.LIMIT or self_check.proven(tensor.device, dtype)
