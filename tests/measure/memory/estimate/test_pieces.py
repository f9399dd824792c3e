"""The estimate of a step in many pieces: from a few of them, the same as from all."""

from dataclasses import replace

import pytest
import torch

from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import CHIP, estimate_memory, pieces_to_trace, traced_memory
from phase1.roster import model_config
from phase1.runs import MemoryRun

SHAPE = MemoryRun(
    vocab_size=500, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=8, copy_window=100,
    htt_rank=2, htt_dense_rows=16, htt_groups=16,
)  # fmt: skip
CASE = MemoryCase(model_config("phase1", SHAPE), batch_size=2, seq_length=64 * 14 + 20, piece_length=64)


@pytest.fixture(autouse=True)
def as_users_run_it():
    torch.use_deterministic_algorithms(False)


def test_many_pieces_are_estimated_from_few():
    assert pieces_to_trace(CASE) == (20 + 3 * 64, 20 + 4 * 64)
    ours, all_of_them = estimate_memory(CASE), traced_memory(CASE, CHIP)
    assert "alike" in ours.assumptions and ours.timeline is None
    assert ours.peak_allocated_bytes == pytest.approx(all_of_them.peak_allocated_bytes, rel=1e-3)
    assert ours.needed_bytes == pytest.approx(all_of_them.needed_bytes, rel=1e-2)
    assert ours.unattributed_bytes == 0


@pytest.mark.parametrize("length", [64 * 10 + 20, 64 * 19 + 20, 64 * 24 + 20])
def test_the_few_have_their_loss_where_all_of_them_have_it(length):
    """At a vocabulary of 5,000 two sequences of 1,250 tokens change from one to the other."""
    case = replace(CASE, model=replace(CASE.model, vocab_size=5000), seq_length=length)
    ours, all_of_them = estimate_memory(case), traced_memory(case, CHIP)
    assert ours.peak_allocated_bytes == pytest.approx(all_of_them.peak_allocated_bytes, rel=1e-2)


def test_memory_grows_by_ids_and_states_alone():
    more = replace(CASE, seq_length=CASE.seq_length + 1000 * 64)
    state = 2 * 3 * 32 + 4 * 2 * 4 * 8 + 2 * 2 * 7 * (4 + 8) + 2 * 8 + 100 * (2 * 8 + 4 + 8)  # bytes of one sequence
    grown = estimate_memory(more).peak_allocated_bytes - estimate_memory(CASE).peak_allocated_bytes
    least = 1000 * 2 * (state + 64 * 16)
    assert least <= grown <= 1.5 * least  # tensors are rounded up to 512 bytes


def test_few_pieces_whole_sequences_and_attention_are_traced_as_they_are():
    attention = replace(CASE, model=model_config("baseline", SHAPE))
    assert [pieces_to_trace(c) for c in (attention, replace(CASE, piece_length=None), replace(CASE, seq_length=200))] == [None] * 3
    assert estimate_memory(attention) == estimate_memory(replace(attention, piece_length=None))
