"""The search finds the last size that fits, whatever memory does in between, in a bounded number of probes."""

import math

from hypothesis import example, given
from hypothesis import strategies as st

from phase1.measure.memory.search import GUIDED_PROBES, Probe, edge, largest_size

GB = 10**9


def run(needed, limit, *, start=4, bound=4096, silent=False, known=None):
    """Search with `needed(size)` bytes; a `silent` probe that runs out of memory does not say by how much, as on a GPU."""
    tried = []

    def probe(size):
        assert 1 <= size <= bound and size not in tried
        tried.append(size)
        fits = needed(size) <= limit
        return Probe("ok" if fits else "oom", needed(size) if fits or not silent else None)

    return largest_size(probe, start, bound, limit, known), tried


def expected(needed, limit, bound):
    return max((size for size in range(1, bound + 1) if needed(size) <= limit), default=0)


@given(
    increments=st.lists(st.integers(0, 2 * 10**9), min_size=1, max_size=300),
    base=st.integers(0, 10**10),
    limit=st.integers(1, 10**11),
    start=st.integers(1, 300),
    silent=st.booleans(),
    knows_zero=st.booleans(),
)
@example(increments=[0] * 300, base=0, limit=1, start=7, silent=True, knows_zero=True)
@example(increments=[0] * 299 + [2 * 10**9], base=0, limit=1, start=1, silent=True, knows_zero=True)
def test_the_result_fits_and_one_more_does_not_for_any_growing_memory(increments, base, limit, start, silent, knows_zero):
    bound, total = len(increments), [base]
    for increment in increments:
        total.append(total[-1] + increment)
    known = {0: Probe("ok", total[0])} if knows_zero else None
    probes, tried = run(total.__getitem__, limit, start=min(start, bound), bound=bound, silent=silent, known=known)
    low, high = edge(probes, bound)
    assert (low, high) == (expected(total.__getitem__, limit, bound), low + 1)
    assert low == 0 or probes[low].status == "ok"
    assert high > bound or probes[high].status == "oom"
    assert len(tried) <= GUIDED_PROBES + 1 + 2 * math.log2(bound + 1)


@given(resident=st.integers(10**8, 6 * 10**9), each=st.integers(10**6, 10**9), start=st.integers(1, 64))
def test_memory_that_is_a_line_takes_five_probes(resident, each, start):
    """The start, up to two on the way if it is far below the answer, the answer, and the size above it."""
    known = {0: Probe("ok", resident)}
    _, tried = run(lambda size: resident + each * size, 7_200_000_000, start=start, known=known)
    assert len(tried) <= 5
    start = 1  # fits, or nothing does: a size that runs out of memory tells less on a GPU
    _, tried = run(lambda size: resident + each * size, 7_200_000_000, start=start, known=known, silent=True)
    assert len(tried) <= 5


def test_memory_that_is_no_line_at_all_is_bounded_too():
    probes, tried = run(lambda size: int(1e6 * 1.01**size), 10**9, known={0: Probe("ok", 10**6)})
    assert edge(probes, 4096)[0] == 694 and len(tried) <= GUIDED_PROBES + 1 + 2 * 12


def test_a_probe_that_died_without_a_number_is_followed_by_a_halving_not_by_its_neighbour():
    """On a GPU, where the first guess is too far because memory starts flat: at small batches the optimizer decides."""

    def needed(size):
        return max(1_300_000_000, 900_000_000 + 170_000_000 * size)

    known = {0: Probe("ok", 10**9), 4: Probe("ok", needed(4))}
    probes, tried = run(needed, 7_200_000_000, silent=True, known=known)
    assert edge(probes, 4096)[0] == 37 and probes[tried[0]].needed_bytes is None
    assert len(tried) <= 5


def test_what_is_known_is_not_probed_again():
    def needed(size):
        return GB + size * GB // 10

    known = {0: Probe("ok", GB), 4: Probe("ok", needed(4))}
    probes, tried = run(needed, 7_200_000_000, known=known)
    assert edge(probes, 4096)[0] == 62 and tried == [62, 63]


def test_a_start_that_does_not_fit_is_halved():
    probes, tried = run(lambda size: size * GB, 10**9, start=64, silent=True)
    assert tried[0] == 64 and tried[1] == 32 and edge(probes, 4096)[0] == 1


def test_the_bound_is_an_answer():
    probes, tried = run(lambda size: GB, 2 * GB, bound=100)
    assert edge(probes, 100) == (100, 101) and max(tried) == 100


def test_nothing_fits():
    probes, _ = run(lambda size: 3 * GB, 2 * GB)
    assert edge(probes, 4096) == (0, 1) and probes[1].status == "oom"


def test_without_a_limit_to_aim_at_it_doubles_and_halves():
    def probe(size):
        return Probe("ok" if size <= 37 else "oom", size if size <= 37 else None)

    probes = largest_size(probe, 4, 4096, None)
    assert list(probes)[:5] == [4, 8, 16, 32, 64] and edge(probes, 4096)[0] == 37


def test_an_error_ends_the_search():
    def probe(size):
        return Probe("error", detail="boom") if size > 8 else Probe("ok", size)

    probes = largest_size(probe, 4, 4096, 100)
    assert [probe.status for probe in probes.values()].count("error") == 1 and list(probes.values())[-1].detail == "boom"


def test_a_size_that_ran_out_of_memory_by_chance_is_believed():
    """Memory on a card is not exactly monotone: the answer is below the smallest size that failed."""
    assert edge({4: Probe("ok"), 8: Probe("oom"), 9: Probe("ok")}, 100) == (4, 8)
