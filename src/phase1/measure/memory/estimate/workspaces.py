"""What operators allocate on a CUDA device besides their results: workspaces of cuBLAS, and scratch space."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phase1.machine.cards import Chip
from phase1.measure.memory.estimate.allocator import MIB

_MATMULS = frozenset(
    getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot")
)
_SEGMENT_ROWS = 10  # NROWS_PER_THREAD in EmbeddingBackwardKernel.cu
_UNSORTED_ROWS = 3072  # up to here the gradient of an embedding is summed without sorting its rows
# of a card of each compute capability, where there are several: V100, RTX 2080 Ti, A100, RTX 3080, 4090, H100, B200, RTX 5090
_MULTIPROCESSORS = {(7, 0): 80, (7, 5): 68, (8, 0): 108, (8, 6): 68, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
_FEW_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}  # of a multiprocessor; 2048 on others
_WARP, _MAX_THREADS = 32, 512  # threads beside each other, and in all, of a block that sums
_MIN_VALUES, _MAX_VALUES = 16, 256  # that one thread should sum


def workspace_bytes(chip: Chip) -> int:
    """Bytes of the workspace of each cuBLAS handle; every thread that multiplies matrices has a handle.

    32 MiB on Hopper and Blackwell, 8.125 MiB on other cards, where CUBLAS_WORKSPACE_CONFIG is not set.
    Source: parseChosenWorkspaceSize in aten/src/ATen/cuda/CublasHandlePool.cpp.
    """
    return 32 * MIB if chip.major in (9, 10, 12) else 8 * MIB + 128 * 1024


class ModelledCuda:
    """`OperatorMemory` (phase1.measure.memory.tracker) of a fake step: what operators of a CUDA device would take besides."""

    def __init__(self, chip: Chip) -> None:
        self.workspace = workspace_bytes(chip)
        self.card = processors(chip)
        self._threads: set[str] = set()

    def before(self, func: Any, phase: str) -> int:
        """A workspace at the first product of the main thread, and at that of autograd's."""
        thread = "autograd" if phase == "backward" else "main"
        if func not in _MATMULS or thread in self._threads:
            return 0
        self._threads.add(thread)
        return self.workspace

    def after(self, func: Any, args: Any) -> tuple[int, None]:
        """The scratch space of `func`."""
        return scratch_bytes(func, args, self.card), None


class Processors(NamedTuple):
    """The parallelism of a card: its multiprocessors, and the threads of each."""

    multiprocessors: int
    threads: int


def processors(chip: Chip) -> Processors:
    """Those of `chip`; if unknown, those of the best-known card of its capability, else of the H100."""
    capability = (chip.major, chip.minor)
    known = chip.multiprocessors or _MULTIPROCESSORS.get(capability, _MULTIPROCESSORS[9, 0])
    return Processors(known, _FEW_THREADS.get(capability, 2048))


def scratch_bytes(func: Any, args: Any, card: Processors) -> int:
    """The temporaries of the kernels that have large ones, from their sources in aten/src/ATen/native; else 0.

    - embedding_dense_backward (cuda/Embedding.cu, EmbeddingBackwardKernel.cu): N int64 indices, in order and sorted, twice;
      and partial sums in float32, of N/10 + min(N, V) rows.
    - index_put with accumulation (cuda/Indexing.cu): the linear index, its sorted copy, both orders and a sort's buffer.
    - logsumexp (ReduceOps.cpp): its input less the maximum.
    - sum over the rows of a matrix (Reduce.cuh): see `_column_sum_bytes`.
    - the backward pass of attention (flash, memory-efficient and cuDNN alike): dQ summed in float32.
    - the fused AR-SSM operator (phase1/ops/ar_ssm): see `_ar_ssm_bytes`.
    - the gradients of an anchored table (phase1/ops/anchored_table): those of the rows between the first level and the last,
      and the sums of chunks of users in float32.
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
    if name == "sum" and len(args) > 1 and args[0].numel():
        return _column_sum_bytes(args[0], {dim % args[0].ndim for dim in args[1] or range(args[0].ndim)}, card)
    if name.startswith("_scaled_dot_product") and name.endswith("backward"):
        return 4 * int(args[1].numel())
    if name in ("ar_ssm", "ar_ssm_backward"):
        backward = name == "ar_ssm_backward"
        proj, q_scale, state_scale, first = (args[i] for i in ((5, 11, 12, 18) if backward else (0, 6, 7, 13)))
        last = backward and args[2] is not None
        return _ar_ssm_bytes(proj, q_scale, state_scale, first is not None, last, backward)
    if name == "anchored_table_backward":
        d_table, users, levels = args[0], args[5], args[6]
        inner = max(0, [0, *levels][-2] - levels[0])
        return int(d_table.shape[1] * (inner * d_table.element_size() + 4 * len(users[-1])))
    return 0


def _ar_ssm_bytes(proj: Tensor, q_scale: Tensor, state_scale: Tensor, first: bool, last: bool, backward: bool) -> int:
    """What the operator holds at its peak and does not return.

    Forward: what each of several stretches adds to the state. Backward: gradients of y, u, v, q, k, x and f in the compute
    type, and four numbers a head and position in float32; where a state goes into a stretch, be it the first, what each adds
    to its gradient; and where one is used after a stretch, be it the `last`, its gradient at each boundary.
    """
    from phase1.ops.ar_ssm.sizes import plan

    (B, T), (H, R), P = proj.shape[:2], q_scale.shape, state_scale.shape[1]
    stretches, _ = plan(B, T, H)
    state = 4 * B * H * R * P
    if not backward:
        return state * stretches if stretches > 1 else 0
    operands, carried = B * T * H * (3 * P + 4 * R) * proj.element_size(), first or stretches > 1
    return operands + 16 * B * H * T + state * (stretches * carried + (stretches + 1) * (carried or last))


def _column_sum_bytes(x: Tensor, dims: set[int], card: Processors) -> int:
    """The buffer of a sum over `dims` that several blocks of threads share: 4 outputs · blocks · width · vector bytes.

    Blocks share a sum where there are too few outputs to keep the card busy and 256 values or more for each thread. A
    block is `width` threads beside each other, each for `vector` neighbouring outputs, and `height` above each other, for
    different summands. The dimension of smallest stride stays; a sum along it needs next to nothing, and 0 is returned.
    Source: setReduceConfig, set_block_dimension and global_memory_size in cuda/Reduce.cuh.
    """
    summed, kept = (_merged(x, [dim for dim in range(x.ndim) if (dim in dims) == inside]) for inside in (True, False))
    if not kept or not summed or summed[0][1] < kept[0][1]:
        return 0
    outputs, inputs = (math.prod(size for size, _ in part) for part in (kept, summed))
    vector = 4 if kept[0][1] == 1 else 1
    while any(n % vector for n in (x.storage_offset(), kept[0][0], *(stride for _, stride in summed + kept[1:]))):
        vector //= 2
    threads = _MAX_THREADS // vector
    columns, rows = (min(1 << n.bit_length() - 1, threads) for n in (outputs // vector, inputs))
    height = min(rows, threads // min(columns, _WARP))
    width = min(columns, threads // height)
    values, grid = -(-inputs // height), -(-(outputs // vector) // width)
    at_once = card.multiprocessors * (card.threads // (width * height))
    if values < _MAX_VALUES or grid > at_once:
        return 0
    blocks = max(min(-(-at_once // grid), -(-values // _MIN_VALUES)), -(-values // _MAX_VALUES))
    return max(4, x.element_size()) * outputs * blocks * width * vector if blocks > 1 else 0


def _merged(x: Tensor, dims: list[int]) -> list[tuple[int, int]]:
    """Size and stride of `dims`, smallest stride first, those that follow each other in memory as one."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted((x.stride(dim), x.shape[dim]) for dim in dims if x.shape[dim] > 1):
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return merged
