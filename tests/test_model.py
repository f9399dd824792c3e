from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phase1.config import EngineShape, ModelConfig, TrainConfig, WatchConfig, present_settings
from phase1.layers.token_table import HTTTable
from phase1.model import LanguageModel
from phase1.ops.htt import htt_lookup_reference
from phase1.roster import ROLES, model_config
from phase1.runs import GenerateRun
from phase1.vocabulary.levels import levels
from phase1.vocabulary.statistics import TokenStatistics

TINY = EngineShape(
    vocab_size=50, d_model=16, n_layers=2, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=1, htt_dense_rows=2, htt_groups=6,
)  # fmt: skip


def model(role="phase1", dtype=torch.float64, **overrides):
    torch.manual_seed(0)
    config = model_config(role, TINY, **overrides)
    return LanguageModel(config, statistics()).to(dtype)


def statistics(V=TINY.vocab_size):
    rng = np.random.default_rng(1)
    frequency = np.sort(rng.random(V).astype(np.float32))[::-1]
    every = levels(V, TINY.d_model, TINY.htt_rank, TINY.htt_dense_rows)
    anchored = [level for level in every if level.anchors]
    n, K = V - anchored[0].start, TINY.htt_dense_rows
    rows, rest, weights = (rng.normal(size=size).astype(np.float32) for size in ((K, 12), (V - K, 12), (n, 1)))
    anchors = np.concatenate([rng.integers(0, level.start, (level.end - level.start, 1)) for level in anchored])
    log_frequency = np.log(frequency / frequency.sum())
    return TokenStatistics(rng.permutation(V), log_frequency, rows, anchors, weights, rest)


def batch(T=37, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.vocab_size, (B, T + 1), generator=generator)
    return ids[:, :-1].clone(), ids[:, 1:].clone()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_changed_token_changes_no_earlier_logit_by_one_bit(role, dtype):
    net, (ids, _) = model(role, dtype), batch(T=150)
    before = net(ids)
    ids[:, 101] = (ids[:, 101] + 1) % TINY.vocab_size
    after = net(ids)
    assert torch.equal(after[:, :101], before[:, :101])
    assert not torch.equal(after[:, 101], before[:, 101])


def test_attention_of_matrix_products_is_the_fused_one():
    fused, products = model("baseline"), model("quadratic_control", recompute="none")
    ids, targets = batch()
    products.load_state_dict(fused.state_dict())
    torch.testing.assert_close(products(ids), fused(ids), rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(net.loss(ids, targets), net.blocks[0].mixer.in_proj.weight) for net in (fused, products)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "role, config_id",
    [
        ("baseline", "69bfcfd1a50e"), ("baseline_optimized", "425c3320abf4"), ("phase1", "000423cfa5a7"),
        ("baseline_fast", "56b9388486ce"), ("phase1_fast", "cc42f78d020d"),
    ],
)  # fmt: skip
def test_the_ids_of_published_results_never_change(role, config_id):
    start = {"row_norm": 1.0, "input_scale": None}  # of all models then; plain Transformers have had a better one since
    for name in {role, {"baseline": "baseline_again", "phase1": "engine_again"}.get(role, role)}:
        assert model_config(name, EngineShape(), **start).config_id == config_id


def test_what_is_recomputed_has_an_id_and_the_name_it_had_before():
    ids = {how: ModelConfig(recompute=how).config_id for how in ("none", "selective", "block")}
    assert len(set(ids.values())) == 3
    for old, new in ((True, "block"), (False, "none")):
        assert ModelConfig(**present_settings({"checkpointing": old})).config_id == ids[new]
    assert present_settings({"checkpointing": 1, "d_model": 8}) == {"checkpointing": 1, "d_model": 8}  # no setting of any version
    with pytest.raises(ValueError, match="--recompute must be one of none, selective, block; got 'all'"):
        ModelConfig(recompute="all")


def test_the_kind_of_attention_is_in_the_id_of_a_model_that_has_attention():
    ids = {role: [model_config(role, TINY, attention=kind).config_id for kind in ("fused", "math")] for role in ROLES}
    assert ids["baseline"][0] != ids["baseline"][1] and ids["phase1"][0] == ids["phase1"][1]


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_pieces_continued_from_their_state_are_the_whole(role):
    net, (ids, _) = model(role), batch(T=37)
    pieces, states = [], None
    for start, end in ((0, 1), (1, 2), (2, 20), (20, 37)):
        logits, states = net.continue_from(ids[:, start:end], states)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), net(ids), rtol=1e-9, atol=1e-9)


def test_the_htt_table_is_one_explicit_table_for_lookup_logits_and_gradients():
    net, (ids, targets) = model(rank_penalty=0.0), batch()
    explicit = model("phase1", embedding="dense", rank_penalty=0.0)
    rows = net.embedding.table(torch.float64)[net.embedding.rows_of(torch.arange(TINY.vocab_size))]
    explicit.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("embedding")}, strict=False)
    explicit.embedding.rows.data.copy_(rows)
    bias = net.embedding.output_bias
    bias.data.zero_()
    torch.testing.assert_close(net(ids), explicit(ids), rtol=1e-9, atol=1e-9)
    for loss in (net.loss(ids, targets), explicit.loss(ids, targets)):
        loss.backward()
    parameters = [p for p in net.embedding.parameters() if p is not bias]
    assert bias.grad.abs().min() > 0
    expected = torch.autograd.grad(rows, parameters, explicit.embedding.rows.grad)
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_a_loaded_model_has_the_anchors_it_was_saved_with_in_both_passes(recompute):
    ids, targets = batch()
    saved = model(recompute=recompute)
    loaded = LanguageModel(saved.config).double()
    assert not torch.equal(loaded.embedding.anchors, saved.embedding.anchors)
    loaded.load_state_dict(saved.state_dict())
    outcomes = []
    for net in (saved, loaded):
        loss = net.loss(ids, targets)
        outcomes.append([loss, *torch.autograd.grad(loss, list(net.embedding.parameters()))])
    for got, expected in zip(*outcomes, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("role", ROLES)
def test_blocks_add_to_a_sum_in_single_precision_under_autocast(role):
    net, (ids, targets) = model(role, torch.float32), batch()
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net.loss(ids, targets).backward()
        net.nll(ids, targets)
    assert len(seen) >= 2 and set(seen) == {torch.float32}


@pytest.mark.parametrize("embedding", ["htt", "dense"])
@pytest.mark.parametrize("change", [{"loss": "materialized"}, {"recompute": "none"}, {"recompute": "selective"}], ids=str)
def test_chunked_loss_and_recomputation_change_neither_loss_nor_gradients(embedding, change):
    ids, targets = batch()
    targets[0, 3] = -100
    outcomes = []
    for overrides in ({}, change):
        net = model(embedding=embedding, **overrides)
        loss = net.loss(ids, targets)
        loss.backward()
        outcomes.append([loss] + [p.grad for p in net.parameters()])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_loss_and_token_losses_are_those_of_the_logits():
    net, (ids, targets) = model().eval(), batch()
    targets[1, 5] = -100
    expected = torch.nn.functional.cross_entropy(net(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(net.loss(ids, targets), expected)
    nll, rank = net.nll(ids, targets)
    assert nll[1, 5] == 0 and 2 <= rank <= 4
    torch.testing.assert_close(nll.sum() / (targets >= 0).sum(), expected)


def test_the_gate_penalty_is_in_the_training_loss_alone():
    (ids, targets), net = batch(), model(rank_penalty=10.0)
    with_penalty, plain = net.loss(ids, targets), net.eval().loss(ids, targets)
    assert torch.isclose(with_penalty - plain, 10.0 * net.nll(ids, targets)[1] / 4)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 1}, {"n_heads": 4}, {"ar_ssm_min_rank": 1}, {"ar_ssm_window": 3}, {"ar_ssm_window": 0}, {"rank_penalty": 0.5},
        {"htt_dense_rows": 3}, {"htt_groups": 7}, {"ar_ssm_max_rank": 2}, {"htt_rank": 2}, {"mixer": "attention"},
        {"embedding": "dense"}, {"vocab_size": 51}, {"d_model": 32}, {"row_norm": 0.5}, {"input_scale": 2.0}, {"logit_scale": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_every_model_setting_changes_the_loss_and_the_config_id(change):
    ids, targets = batch()
    config = model_config("phase1", TINY)
    losses = []
    for c in (config, replace(config, **change)):
        torch.manual_seed(0)
        losses.append(LanguageModel(c).loss(ids, targets).item())
    assert losses[0] != losses[1] and replace(config, **change).config_id != config.config_id


def test_settings_a_model_does_not_use_do_not_change_its_id():
    config = model_config("baseline", TINY)
    assert replace(config, htt_rank=8, ar_ssm_max_rank=8).config_id == config.config_id


@pytest.mark.parametrize("role", ["baseline", "phase1"])
@pytest.mark.parametrize("token", [50, -1])
def test_ids_outside_the_vocabulary_are_refused(role, token):
    ids, targets = batch()
    ids[0, 0] = token
    with pytest.raises(ValueError, match=f"between 0 and 49; got {token}"):
        model(role).loss(ids, targets)


def test_the_table_keeps_its_promise_at_the_documented_size():
    config = ModelConfig()
    table = HTTTable(50257, 512, rank=config.htt_rank, dense_rows=config.htt_dense_rows, groups=config.htt_groups)
    rows = table.table(torch.float32)
    for start in (0, 1024, 2048, 4096, 8192, 16384, 50000):  # every stretch starts like the dense rows
        assert 0.8 < rows[start : start + 200].std() * 512**0.5 < 1.2
    assert sum(p.numel() for p in table.parameters()) < 0.1 * 50257 * 512


def test_the_table_starts_where_its_statistics_say():
    V, D, r, K = 200, 16, 2, 20
    rng, every = np.random.default_rng(0), levels(V, D, r, K)
    assert [level.rank for level in every] == [16, 16, 12, 6]  # the last two have anchors, the last one not all columns
    anchors = np.concatenate([rng.integers(0, level.start, (level.end - level.start, 1)) for level in every[2:]])
    rows, rest, weights = (rng.normal(size=size).astype(np.float32) for size in ((K, 12), (V - K, 12), (len(anchors), 1)))
    found = TokenStatistics(rng.permutation(V), np.zeros(V, dtype=np.float32), rows, anchors, weights, rest)
    table = HTTTable(V, D, r, K, groups=6, statistics=found)
    expected = list(np.pad(rows, ((0, 0), (0, 4))) / 12**0.5)
    for i in range(K, V):
        rank = next(level.rank for level in every if i < level.end)
        own = np.zeros(D, dtype=np.float32)
        own[: min(rank, 12)] = rest[i - K, :rank] / 12**0.5
        expected.append(own)
        if i >= every[2].start:
            place = i - every[2].start
            expected[-1] = expected[-1] + weights[place, 0] * expected[anchors[place, 0]]
    torch.testing.assert_close(table.table(torch.float32).detach().numpy(), np.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_token_order_that_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match="once each"):
        LanguageModel(model_config("phase1", TINY), statistics()._replace(row_of_id=np.zeros(50, dtype=np.int64)))


def test_parameter_counts_add_up():
    net = model()
    counts = net.parameter_counts()
    norms = sum(p.numel() for name, p in net.named_parameters() if "_norm" in name or name.startswith("norm"))
    assert counts["total"] == counts["embedding"] + counts["mixer"] + counts["mlp"] + counts["copy_head"] + norms
    d_model = net.config.d_model
    assert counts["copy_head"] == 3 * d_model**2 // net.config.n_heads + 2 * (d_model + 1)  # projections, gate, forgetting


@pytest.mark.parametrize(
    "sizes, remedy",
    [
        ({"d_model": 510}, "try 496"),
        ({"htt_rank": 513}, "smaller rank"),
        ({"ar_ssm_max_rank": 514}, "smaller rank"),
        ({"ar_ssm_max_rank": 2}, "lower it"),
        ({"vocab_size": 0}, "positive"),
        ({"htt_dense_rows": 50257}, "lower one"),
        ({"ar_ssm_window": -1}, "0 or more"),
    ],
)
def test_wrong_sizes_name_the_flag_and_the_remedy(sizes, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        ModelConfig(**sizes)
    assert "--" in str(error.value) and "\n" not in str(error.value)


def rows_by_definition(table, every):
    rows, V = list(table.rows), len(table.row_of_id)
    for i in range(len(rows), V):
        level = next(level for level in every if i < level.end)
        if level.rank:
            part = next(part for part, other in zip(table.band.coordinates, every) if other is level)
            row = F.pad(part[i - level.start], (0, table.rows.shape[1] - level.rank))
        else:
            row = htt_lookup_reference(torch.tensor(i - level.start), table.tail.cores)
        if level.anchors:
            place = i - (V - len(table.anchors))
            for weight, anchor in zip(table.weights[place], table.anchors[place]):
                assert anchor < level.start
                row = row + weight * rows[anchor]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dense_rows", [0, 1, 2, 3, 5, 20, 44])
def test_the_table_is_its_definition_row_by_row_even_without_dense_rows_band_or_tail(dense_rows):
    torch.manual_seed(dense_rows)
    table = HTTTable(50, 16, rank=4, dense_rows=dense_rows, groups=6).double()
    parameters = [p for name, p in table.named_parameters() if p.numel() and name != "output_bias"]
    for parameter in parameters:
        parameter.data.normal_()
    outcomes = []
    for rows in (table.table(torch.float64), rows_by_definition(table, levels(50, 16, 4, dense_rows))):
        outcomes.append((rows, *torch.autograd.grad((rows * rows.detach().cos()).sum(), parameters)))
    for got, expected in zip(*outcomes, strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("flag", ["mixer", "embedding"])
def test_a_mixer_or_table_that_does_not_exist_is_refused_by_the_names_of_those_that_do(flag):
    with pytest.raises(ValueError, match=f"--{flag} must be one of .*, .*; got 'mamba\\\\n'; correct it"):
        model(**{flag: "mamba\n"})


@pytest.mark.parametrize(
    "cls, name, value, choices",
    [
        (ModelConfig, "htt_output", "x", "flat, two_level"),
        (ModelConfig, "loss", "foo", "chunked, materialized"),
        (ModelConfig, "attention", "flash", "fused, math"),
        (ModelConfig, "dense_start", "stat", "random, statistics"),
        (ModelConfig, "copy_head", "no", "True, False"),
        (ModelConfig, "copy_head", None, "True, False"),
        (TrainConfig, "precision", "fp8", "auto, fp16, bf16, fp32"),
        (WatchConfig, "report_to", ("wandb", "mail"), "tensorboard, wandb, trackio"),
        (GenerateRun, "cuda_graphs", "auto", "True, False, None"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(cls, name, value, choices):
    with pytest.raises(ValueError) as raised:
        cls(**{name: value})
    wrong = value[-1] if isinstance(value, tuple) else value
    assert str(raised.value) == f"--{name.replace('_', '-')} must be one of {choices}; got {wrong!r}; correct it"


@pytest.mark.parametrize("function", ["nll", "losses", "loss"])
def test_targets_of_another_shape_than_the_ids_are_refused(function):
    net, (ids, _) = model(), batch(T=9)
    says = r"^targets must have the shape of ids, \(2, 8\); got \(2, 9\); give ids\[:, :-1\] and ids\[:, 1:\]$"
    with pytest.raises(ValueError, match=says):
        getattr(net, function)(ids[:, :-1], ids)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (3,)])
def test_the_loss_of_no_token_is_refused(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^ids must be \(B, T\) and have a token; got shape \([^\n]*$"):
        model().nll(ids, ids)
