import pytest
import torch

from phase1.measure.throughput.saturation import GROWTH, MOST, busy_batch, graphs_fail, saturating_batch
from phase1.roster import ROLES, model_config
from phase1.runs import ThroughputRun

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def card(idle_until):
    """Seconds of a step on a card that up to `idle_until` sequences takes the time of one."""
    return lambda batch: max(1.0, batch / idle_until)


def test_a_busy_card_keeps_the_batch_that_was_asked_for():
    assert busy_batch(4, card(1), lambda batch: True) == (4, "")


@pytest.mark.parametrize("idle_until", [8, 16, 64, 200])
def test_a_card_that_waits_gets_the_smallest_batch_whose_double_costs_its_time(idle_until):
    batch, why = busy_batch(4, card(idle_until), lambda batch: True)
    seconds = card(idle_until)
    assert seconds(2 * batch) >= GROWTH * seconds(batch)
    assert seconds(batch) < GROWTH * seconds(batch // 2), "half of it does not"
    assert "twice the 4 sequences take 1.00 x the time" in why


def test_memory_ends_the_search_and_says_what_to_do():
    batch, why = busy_batch(4, card(1000), lambda batch: batch <= 16)
    assert batch == 16 and "memory allows no more than 16, give longer --seq-lengths" in why


def test_the_search_is_bounded():
    batch, why = busy_batch(4, lambda batch: 1.0, lambda batch: True)
    assert batch == 4 * MOST and f"{MOST} x --batch-size" in why


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_graphs_can_be_captured_and_a_batch_is_found():
    models = {role: model_config(role, ThroughputRun()) for role in ROLES}
    assert graphs_fail(models, 512) == ""
    batch, _ = saturating_batch(models["phase1"], models, 1, 256, 1024, True)
    assert batch >= 1
