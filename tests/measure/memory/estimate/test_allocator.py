import random

import pytest

from phase1.measure.memory.estimate.allocator import MIB, CachingAllocator, rounded


@pytest.fixture
def allocator():
    return CachingAllocator()


def allocated(allocator, *sizes):
    return [allocator.allocate(size) for size in sizes]


def test_requests_are_rounded_up_to_512_bytes(allocator):
    assert [rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    allocated(allocator, 1, 512, 513)
    assert allocator.allocated_bytes == 512 + 512 + 1024


@pytest.mark.parametrize(
    "size, reserved",
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)],
)
def test_a_segment_is_2_mib_for_small_20_for_large_and_a_multiple_of_2_for_larger_requests(allocator, size, reserved):
    allocator.allocate(size)
    assert allocator.reserved_bytes == reserved


def test_small_requests_share_a_segment_and_large_ones_another(allocator):
    allocated(allocator, *[1000] * 100, *[3 * MIB] * 6)
    assert allocator.reserved_bytes == 22 * MIB


def test_a_rest_of_at_most_1_mib_stays_with_its_large_block(allocator):
    a, b = allocated(allocator, 11 * MIB, 10 * MIB + 512)  # segments of 12 MiB: one leaves 1 MiB, the other more
    assert (allocator.block_bytes(a), allocator.block_bytes(b)) == (12 * MIB, 10 * MIB + 512)
    assert allocator.allocated_bytes == 22 * MIB + 512


def test_the_smallest_free_block_that_fits_is_used(allocator):
    big, small = allocated(allocator, 30 * MIB, 12 * MIB)
    allocator.free(big)
    allocator.free(small)
    assert allocated(allocator, 12 * MIB, 12 * MIB, 12 * MIB) == [small, big, big + 12 * MIB]
    assert allocator.reserved_bytes == 42 * MIB


def test_freed_neighbours_become_one_block(allocator):
    a, b, c = allocated(allocator, 6 * MIB, 6 * MIB, 6 * MIB)  # of one segment of 20 MiB; 2 MiB are left
    for block in (a, c, b):
        allocator.free(block)
    assert allocator.allocate(20 * MIB) == a
    assert allocator.reserved_bytes == 20 * MIB


def test_nothing_is_given_for_nothing(allocator):
    allocator.free(allocator.allocate(0))
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0 == allocator.block_bytes(0)


def test_random_requests_never_overlap_and_everything_can_be_freed(allocator):
    draw, alive = random.Random(0), {}
    for _ in range(3000):
        if alive and draw.random() < 0.48:
            allocator.free(alive.popitem()[0] if draw.random() < 0.5 else _pop_random(alive, draw))
        else:
            size = draw.choice([draw.randint(1, 4000), draw.randint(1, 3 * MIB), draw.randint(MIB, 40 * MIB)])
            address = allocator.allocate(size)
            assert address not in alive and allocator.block_bytes(address) >= size
            alive[address] = allocator.block_bytes(address)
        assert allocator.allocated_bytes == sum(alive.values()) <= allocator.reserved_bytes
    spans = sorted(alive.items())
    assert all(address + size <= following for (address, size), (following, _) in zip(spans, spans[1:]))
    reserved = allocator.reserved_bytes
    for address in alive:
        allocator.free(address)
    assert allocator.allocated_bytes == 0 and allocator.reserved_bytes == reserved
    assert sum(size for pool in allocator._free.values() for size, _ in pool) == reserved  # whole segments, nothing lost
    assert all(piece.before is piece.after is None for piece in allocator._pieces.values())


def _pop_random(alive, draw):
    address = draw.choice(list(alive))
    del alive[address]
    return address
