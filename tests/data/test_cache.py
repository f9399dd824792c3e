"""Cached ids are mapped, not read into memory, and a damaged file is made again."""

import tracemalloc

import numpy as np
import pytest

from phase1.data.cache import cached_ids

KEY, TYPE = {"text": "k"}, np.dtype(np.uint16)
IDS = np.arange(4_000_000, dtype=np.uint32).astype(TYPE)


def none():
    raise AssertionError("computed again")


def test_ids_of_a_later_run_take_no_memory(tmp_path):
    assert isinstance(cached_ids(tmp_path, KEY, TYPE, lambda: IDS), np.memmap)  # nor do those of the first, once they are kept
    tracemalloc.start()
    ids = cached_ids(tmp_path, KEY, TYPE, none)
    assert np.array_equal(ids[-5:], IDS[-5:]) and len(ids) == len(IDS) and ids.dtype == TYPE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < IDS.nbytes / 8
    ids[0] = 7  # stays here
    assert np.array_equal(cached_ids(tmp_path, KEY, TYPE, none), IDS)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b[:40] + b"x" + b[41:], lambda b: b + b"x"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    cached_ids(tmp_path, KEY, TYPE, lambda: IDS[:100])
    (path,) = (tmp_path / "tokens").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    made = []
    assert np.array_equal(cached_ids(tmp_path, KEY, TYPE, lambda: (made.append(1), IDS[:100])[1]), IDS[:100]) and made
    assert np.array_equal(cached_ids(tmp_path, KEY, TYPE, none), IDS[:100])


def test_no_ids_are_kept_as_no_ids(tmp_path):
    for compute in (lambda: IDS[:0], none):
        assert len(cached_ids(tmp_path, KEY, TYPE, compute)) == 0
