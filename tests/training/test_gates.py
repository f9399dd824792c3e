"""Layers whose rank gate has closed are found while a model scores, and training says so."""

from phase1.training.gates import closed_gates
from phase1.training.watch import Watch
from tests.training.test_progress import run
from tests.training.test_step import batch_at, state


def close(model, layer):
    """Bias of the gate: no rank that can be switched off is left."""
    model.blocks[layer].mixer.rank_gate.out_proj.bias.data.fill_(-30)


def seen(model):
    with closed_gates(model) as closed:
        model.nll(*batch_at(0))
    return closed


def test_a_closed_gate_is_found_in_its_layer():
    model = state(n_layers=3).model
    assert seen(model) == []
    close(model, 1)
    assert seen(model) == [2]
    close(model, 2)
    assert seen(model) == [2, 3]
    assert not any(block.mixer._forward_hooks for block in model.blocks)


def test_models_without_a_gate_have_none_that_is_closed():
    assert seen(state(ar_ssm_min_rank=4, ar_ssm_max_rank=4).model) == seen(state(role="baseline").model) == []


def test_a_training_says_it_once(tmp_path, monkeypatch):
    def score(model):
        close(model, 0)
        model.nll(*batch_at(0))
        return 4.0

    out, _ = run(tmp_path, 10, monkeypatch, watch=Watch(score=score, score_every=2))
    (line,) = (line for line in out.splitlines() if "gate" in line)
    assert line == "warning: the rank gate is closed in layer 1: only ranks that are always on are used there; lower --rank-penalty"
