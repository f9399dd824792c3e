import tracemalloc

import numpy as np
import pytest
import torch

from phase1.data import Windows

IDS = np.arange(103, dtype=np.uint16)  # 10 windows of 10 tokens, two left over


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = Windows(IDS, 10, seed=0).batch(0, 4)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_every_epoch_has_every_window_once_in_an_order_of_its_own():
    windows = Windows(IDS, 10, seed=3)
    epochs = [[int(windows.window(i)[0][0]) for i in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_a_batch_depends_on_nothing_but_its_step():
    windows = Windows(IDS, 10, seed=1)
    forward = [windows.batch(step, 4) for step in range(8)]
    for step in reversed(range(8)):
        resumed = Windows(IDS, 10, seed=1).batch(step, 4)
        assert all(torch.equal(a, b) for a, b in zip(forward[step], resumed))
        assert all(torch.equal(a, b) for a, b in zip(forward[step], windows.batch(step, 4)))


def test_a_batch_size_cuts_one_and_the_same_order():
    windows = Windows(IDS, 10, seed=1)
    ones = torch.cat([windows.batch(step, 1)[0] for step in range(24)])
    assert torch.equal(ones, torch.cat([windows.batch(step, 6)[0] for step in range(4)]))


def test_seed_changes_the_order():
    orders = [[int(Windows(IDS, 10, seed).window(i)[0][0]) for i in range(10)] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_the_last_window_has_a_target_for_every_token():
    assert len(Windows(IDS[:101], 10, 0)) == 10
    assert len(Windows(IDS[:100], 10, 0)) == 9
    assert len(Windows(IDS[:11], 10, 0)) == 1


@pytest.mark.parametrize("count, seq_length", [(10, 10), (0, 10), (103, 0), (103, -1)])
def test_too_few_tokens_for_a_window_are_one_line(count, seq_length):
    with pytest.raises(ValueError, match=f"^the text must have at least [^\n]*got {count} [^\n]*$"):
        Windows(IDS[:count], seq_length, 0)


def test_what_was_seen_is_every_token_of_the_windows_drawn_so_far():
    ids = np.arange(1000, dtype=np.uint16)
    windows = Windows(ids, 10, seed=3)
    drawn = [windows.window(i) for i in range(7)]
    expected = sorted({int(t) for inputs, targets in drawn for t in (*inputs, *targets)})
    assert sorted(set(windows.seen(7).tolist())) == expected
    assert windows.seen(len(windows)) is ids and windows.seen(5000) is ids


def test_what_was_seen_takes_the_memory_of_its_tokens():
    windows = Windows(np.zeros(2_000_000, np.uint16), 100, 0)
    tracemalloc.start()
    seen = windows.seen(len(windows) // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.nbytes < peak < 1.5 * seen.nbytes
