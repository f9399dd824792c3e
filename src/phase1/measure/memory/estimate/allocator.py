"""PyTorch's caching allocator for CUDA, simulated: what a sequence of requests allocates and reserves."""

import bisect
from dataclasses import dataclass

MIB = 2**20
BLOCK_BYTES = 512  # every block is a multiple of this
SMALL_BYTES = MIB  # up to here a block comes from the small pool, whose segments are 2 MiB
LARGE_SEGMENT_BYTES, LARGE_REQUEST_BYTES = 20 * MIB, 10 * MIB  # a request below 10 MiB gets a segment of 20 MiB
SEGMENT_BYTES = 2 * MIB  # a larger one gets its own, in multiples of this


@dataclass(eq=False)
class _Piece:
    """A range of a segment, in use or free, linked to the ranges before and after it."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: "_Piece | None" = None
    after: "_Piece | None" = None


class CachingAllocator:
    """The default allocator of one stream: best fit, split where the rest is worth keeping, merge when freed.

    `allocated_bytes` counts whole blocks, as `torch.cuda.memory_allocated` does: a block of more than 1 MiB is up to
    1 MiB larger than the request where the rest was too small to split off. Segments are never given back.
    Source: c10/cuda/CUDACachingAllocator.cpp (malloc, should_split, get_allocation_size, free_block), default settings.
    """

    def __init__(self) -> None:
        self.allocated_bytes = self.reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address), sorted, by pool
        self._pieces: dict[int, _Piece] = {}

    def allocate(self, size: int) -> int:
        """The address of a block of at least `size` bytes; 0, which is no block, for 0 bytes."""
        if size == 0:
            return 0
        size = rounded(size)
        small = size <= SMALL_BYTES
        pool = self._free[small]
        at = bisect.bisect_left(pool, (size, 0))
        piece = self._pieces[pool.pop(at)[1]] if at < len(pool) else self._segment(size, small)
        rest = piece.size - size
        if rest >= BLOCK_BYTES if small else rest > SMALL_BYTES:
            self._split(piece, size)
        piece.free = False
        self.allocated_bytes += piece.size
        return piece.address

    def free(self, address: int) -> None:
        """Give the block at `address` back."""
        if address == 0:
            return
        piece = self._pieces[address]
        self.allocated_bytes -= piece.size
        piece.free = True
        for other in (piece.before, piece.after):
            if other is not None and other.free:
                pool = self._free[piece.small]
                del pool[bisect.bisect_left(pool, (other.size, other.address))]
                piece = self._merge(other, piece) if other is piece.before else self._merge(piece, other)
        bisect.insort(self._free[piece.small], (piece.size, piece.address))

    def block_bytes(self, address: int) -> int:
        """Size of the block at `address`."""
        return self._pieces[address].size if address else 0

    def _segment(self, size: int, small: bool) -> _Piece:
        if small:
            length = SEGMENT_BYTES
        elif size < LARGE_REQUEST_BYTES:
            length = LARGE_SEGMENT_BYTES
        else:
            length = -(-size // SEGMENT_BYTES) * SEGMENT_BYTES
        piece = _Piece(self.reserved_bytes + SEGMENT_BYTES, length, small)  # addresses grow, as the driver's do, from above 0
        self._pieces[piece.address] = piece
        self.reserved_bytes += length
        return piece

    def _split(self, piece: _Piece, size: int) -> None:
        rest = _Piece(piece.address + size, piece.size - size, piece.small, before=piece, after=piece.after)
        if rest.after is not None:
            rest.after.before = rest
        piece.size, piece.after = size, rest
        self._pieces[rest.address] = rest
        bisect.insort(self._free[piece.small], (rest.size, rest.address))

    def _merge(self, left: _Piece, right: _Piece) -> _Piece:
        left.size += right.size
        left.after, left.free = right.after, True
        if left.after is not None:
            left.after.before = left
        del self._pieces[right.address]
        return left


def rounded(size: int) -> int:
    """`size` in whole blocks of 512 bytes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
