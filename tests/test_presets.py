"""Presets of cards: by the estimate, what each sets fits its card."""

import pytest

from phase1.cli import parse
from phase1.commands import memory, throughput
from phase1.machine.cards import card_for
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.measured import memory_result
from phase1.presets import PRESETS
from phase1.roster import model_config

GUIDE = {"rtx3080-10g", "rtx3080m-8g", "rtx4090-24g"}  # whose sizes are those of the original guide
OURS = sorted(PRESETS.keys() - GUIDE - {"smoke"})


def estimate(role, model, batch_size, seq_length, card):
    return memory_result(role, MemoryCase(model, batch_size, seq_length, dry_run=True, chip=card_for(card).chip))


def needed(result):
    return result.peak_reserved_bytes + result.outside_allocator_bytes


@pytest.mark.parametrize("preset", sorted(GUIDE | set(OURS)))
def test_the_engine_fits_its_card_and_in_presets_of_ours_every_model_does(preset):
    run = parse("memory", ["--preset", preset])
    for role, model in memory.models(run).items():
        if role == "phase1" or preset in OURS:
            assert needed(estimate(role, model, run.batch_size, run.seq_length, preset)) <= card_for(preset).usable_bytes, role


@pytest.mark.parametrize("preset", OURS)
def test_the_models_of_a_throughput_run_fit_together(preset):
    """CUDA graphs keep what a model's step took, so at the longest length the card holds the peaks of all models."""
    run, card = parse("throughput", ["--preset", preset]), card_for(preset)
    assert len(run.seq_lengths) >= 4 and max(run.seq_lengths) >= 8 * min(run.seq_lengths)  # what a verdict needs
    longest, total, outside = max(run.seq_lengths), 0, 0
    for role, model in throughput.models(run, "cuda").items():
        result = estimate(role, model, run.batch_size, longest, preset)
        total, outside = total + result.peak_reserved_bytes, max(outside, result.outside_allocator_bytes)
    assert total + outside <= card.usable_bytes


@pytest.mark.parametrize("preset", OURS)
def test_training_and_scoring_of_perplexity_fit(preset):
    run, usable = parse("perplexity", ["--preset", preset]), card_for(preset).usable_bytes
    for role in ("baseline", "phase1"):
        for batch in (run.micro_batch_size, run.batch_size):  # scoring keeps less than a training step
            assert needed(estimate(role, model_config(role, run), batch, run.seq_length, preset)) <= usable
