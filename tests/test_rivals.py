"""The Transformers that the engine is measured against: they know what it knows, and have what its blocks have."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from phase1.config import EngineShape, TrainConfig
from phase1.layers.attention import Attention
from phase1.layers.norm import rms_norm
from phase1.layers.rotary import rotary, rotate
from phase1.measure.perplexity.candidates import candidates, variant
from phase1.model import LanguageModel
from phase1.roster import FAIR, RIVALS, Key, model_config
from phase1.runs import PerplexityRun
from phase1.training.job import make_state, start_of
from phase1.vocabulary.levels import levels
from phase1.vocabulary.statistics import token_statistics, token_vectors

V = 300
TINY = EngineShape(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=2, htt_dense_rows=20, htt_groups=10, copy_window=8,
)  # fmt: skip
ENGINE = model_config("phase1", TINY)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).zipf(1.3, 5_000).clip(max=V - 20) - 1  # the last 20 never occur


def model(config, statistics=None):
    torch.manual_seed(0)
    return LanguageModel(config, statistics).double()


def batch(T=37, B=2):
    ids = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


@pytest.mark.parametrize("dense_rows", [20, 80])
def test_both_kinds_of_table_start_from_the_same_knowledge(ids, dense_rows):
    every = levels(V, 16, 2, dense_rows)
    htt = token_statistics(ids, vocab_size=V, levels=every, dim=12, seed=3)
    dense = token_vectors(ids, vocab_size=V, dim=12, seed=3)
    id_at = np.argsort(htt.row_of_id)
    assert np.array_equal(dense.log_frequency[id_at], htt.log_frequency)
    assert np.array_equal(dense.rows[id_at[:dense_rows]], htt.rows)


@pytest.mark.parametrize("name", ["ar_ssm_dense", "ar_ssm_dense_no_copy", "transformer_start", "transformer_fair_copy"])
def test_a_dense_table_starts_at_the_log_frequencies_and_at_the_rows_of_the_htt_table(ids, name):
    dense = make_state(variant(name, ENGINE), TrainConfig(), ids).model.embedding
    htt = make_state(ENGINE, TrainConfig(), ids).model.embedding
    counts = np.bincount(ids, minlength=V)
    expected = torch.from_numpy(np.log((counts + 1) / (len(ids) + V))).float()
    torch.testing.assert_close(dense.output_bias.detach(), expected)
    frequent = torch.argsort(htt.row_of_id)[:20]
    assert torch.equal(dense.rows[frequent], htt.rows) and torch.equal(
        dense.output_bias[torch.argsort(htt.row_of_id)], htt.output_bias
    )
    torch.testing.assert_close(dense.rows.norm(dim=1)[counts > 0], torch.ones(np.count_nonzero(counts)))


def test_the_baseline_starts_from_nothing(ids):
    assert start_of(model_config("baseline", TINY), ids, 0, "cpu") is None
    assert LanguageModel(model_config("baseline", TINY)).embedding.output_bias is None


def test_every_rival_is_the_baseline_with_what_its_name_says():
    run = PerplexityRun(variants=tuple(RIVALS))
    found = {candidate.key: candidate.config for candidate in candidates(run)}
    chunked = replace(found["baseline"], loss="chunked")  # the same loss, faster
    long = {"row_norm": 1.0, "input_scale": None}  # rows that start at vectors; those at random are shorter
    for name, own in RIVALS.items():
        start = long if "dense_start" in own else {}
        assert found[name] == replace(chunked, **own, **start) and str(Key.of(found[name])) == name
        assert str(Key.of(replace(found[name], **{f: getattr(found["baseline"], f) for f in own}))) == "baseline"
    assert len({config.config_id for config in found.values()}) == len(found)
    assert str(Key.of(replace(found["transformer_fair"], attention_conv=False))) == "transformer"


def test_settings_of_attention_are_in_no_id_of_an_engine_and_the_start_of_a_dense_table_in_none_of_htt():
    for change in (
        {"attention_qk_norm": True},
        {"attention_conv": True},
        {"attention_gate": True},
        {"dense_start": "statistics"},
    ):
        assert replace(ENGINE, **change).config_id == ENGINE.config_id
        assert replace(model_config("baseline", TINY), **change).config_id != model_config("baseline", TINY).config_id


def test_fair_attention_is_its_formula():
    torch.manual_seed(0)
    D, H, T = 16, 2, 11
    layer = Attention(D, H, qk_norm=True, conv=True, gate=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(2, T, D, dtype=torch.float64)
    mixed, z = layer.in_proj(h).split([3 * D, D], -1)
    padded = torch.nn.functional.pad(mixed, (0, 0, 3, 0))
    mixed = layer.conv_bias + sum(padded[:, j : j + T] * layer.conv_weight[j] for j in range(4))
    q, k, v = mixed.view(2, T, 3, H, D // H).unbind(2)
    q, k, v = rms_norm(q) * layer.q_scale, rms_norm(k), torch.nn.functional.silu(v)
    angles = rotary(q, 0)
    scores = torch.einsum("bthp,bshp->bhts", rotate(q, *angles), rotate(k, *angles)) / (D // H) ** 0.5
    weights = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshp->bthp", weights, v).flatten(2)
    expected = layer.out_proj(rms_norm(y * torch.nn.functional.silu(z), layer.norm))
    torch.testing.assert_close(layer(h)[0], expected, rtol=1e-9, atol=1e-9)


def test_every_part_of_fair_attention_has_an_effect_of_its_own():
    ids, targets = batch()
    base = variant("transformer_fair", ENGINE)
    losses = [
        model(replace(base, **{name: False} if name else {})).loss(ids, targets).item() for name in (None, *(part for part in FAIR if part.startswith("attention")))
    ]
    assert len(set(losses)) == 4


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "transformer_copy"])
def test_rivals_are_causal_and_continue_from_their_state(name):
    net, (ids, _) = model(variant(name, ENGINE)), batch()
    whole, pieces, states = net(ids), [], None
    for start, end in ((0, 1), (1, 2), (2, 20), (20, 37)):
        logits, states = net.continue_from(ids[:, start:end], states)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    ids[:, 21] = (ids[:, 21] + 1) % V
    assert torch.equal(net(ids)[:, :21], whole[:, :21]) and not torch.equal(net(ids)[:, 21], whole[:, 21])


def test_a_dense_table_with_biases_has_one_loss_in_both_forms():
    ids, targets = batch()
    for name in ("transformer_start", "transformer_fair_copy"):
        outcomes = []
        for form in ("materialized", "chunked"):
            net = model(replace(variant(name, ENGINE), loss=form))
            net.embedding.output_bias.data.normal_(generator=torch.Generator().manual_seed(1))
            loss = net.loss(ids, targets)
            outcomes.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
        for got, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
