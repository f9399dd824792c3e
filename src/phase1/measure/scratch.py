"""What operators allocate on a CUDA device besides their results: workspaces of cuBLAS, and scratch space."""

import math
from typing import Any

import torch

from phase1.measure.allocator import MIB

_MATMULS = frozenset(
    getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot")
)
_SEGMENT_ROWS = 10  # NROWS_PER_THREAD in EmbeddingBackwardKernel.cu
_UNSORTED_ROWS = 3072  # up to here the gradient of an embedding is summed without sorting its rows


def workspace_bytes(capability: tuple[int, int]) -> int:
    """What PyTorch gives each cuBLAS handle, of which every thread that multiplies matrices has one.

    32 MiB on Hopper and Blackwell, 8.125 MiB on other cards, where CUBLAS_WORKSPACE_CONFIG is not set.
    Source: parseChosenWorkspaceSize in aten/src/ATen/cuda/CublasHandlePool.cpp.
    """
    return 32 * MIB if capability[0] in (9, 10, 12) else 8 * MIB + 128 * 1024


class ModelledCuda:
    """`Surroundings` (phase1.measure.tracker) of a fake step: what the operators of a CUDA device would take besides."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.workspace = workspace_bytes(capability)
        self._threads: set[str] = set()

    def before(self, func: Any, phase: str) -> int:
        """A workspace at the first product of the main thread, and at that of autograd's."""
        thread = "autograd" if phase == "backward" else "main"
        if func not in _MATMULS or thread in self._threads:
            return 0
        self._threads.add(thread)
        return self.workspace

    def after(self, func: Any, args: Any) -> tuple[int, None]:
        """The scratch of `func`."""
        return scratch_bytes(func, args), None


def scratch_bytes(func: Any, args: Any) -> int:
    """The temporaries of the kernels that have large ones, from their sources in aten/src/ATen/native; else 0.

    - embedding_dense_backward (cuda/Embedding.cu, EmbeddingBackwardKernel.cu): N int64 indices, in order and sorted, twice;
      and partial sums in float32, of N/10 + min(N, V) rows.
    - index_put with accumulation (cuda/Indexing.cu): the linear index, its sorted copy, both orders and a sort's buffer.
    - logsumexp (ReduceOps.cpp): its input less the maximum.
    - the backward pass of attention (flash, memory-efficient and cuDNN alike): dQ summed in float32.
    """
    name = func.__name__.split(".")[0]
    if name == "embedding_dense_backward":
        gradient, indices, rows = args[0], args[1], args[2]
        n = indices.numel()
        if n <= _UNSORTED_ROWS:
            return 0
        return 4 * 8 * n + 4 * gradient.shape[-1] * (n // _SEGMENT_ROWS + min(n, rows))
    if name in ("index_put", "index_put_", "_index_put_impl_") and len(args) > 3 and args[3]:
        n = math.prod(torch.broadcast_shapes(*(index.shape for index in args[1] if index is not None)))
        values = args[2]
        return 5 * 8 * n + (0 if values.is_contiguous() else values.numel() * values.element_size())
    if name == "logsumexp":
        return int(args[0].numel() * args[0].element_size())
    if name.startswith("_scaled_dot_product") and name.endswith("backward"):
        return 4 * int(args[1].numel())
    return 0
