"""A model whose output has two levels: an exact distribution, one loss in every form, and the flat output at the start."""

import pytest
import torch

from phase1.config import EngineShape, TrainConfig
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE
from phase1.roster import model_config
from phase1.training.optimizers import parameter_groups

# 503 - 16 x 8 = 375 rows in the tail: 94 groups of 4, the last of 3; all 320 of 5 with 64 groups
TINY = EngineShape(vocab_size=503, d_model=32, n_layers=1, n_heads=2, htt_dense_rows=8, htt_groups=100, ar_ssm_max_rank=8, htt_rank=8, htt_output="two_level")
MODELS = {
    "engine": {},
    "no copy head": {"copy_head": False},
    "attention": {"mixer": "attention", "copy_head": False},
    "recomputed": {"recompute": "block"},
    "materialized": {"loss": "materialized"},
    "whole groups": {"vocab_size": 448, "htt_groups": 64},
    "no dense rows": {"htt_dense_rows": 0, "htt_groups": 50},
}


def model_and_batch(name, dtype=torch.float64, **overrides):
    torch.manual_seed(0)
    net = LanguageModel(model_config("phase1", TINY, **({"recompute": "none"} | MODELS[name] | overrides))).to(dtype)
    with torch.no_grad():
        for parameter in (*net.embedding.groups.parameters(), net.embedding.output_bias):
            parameter += torch.randn_like(parameter) * 0.1  # not where it starts
    ids = torch.randint(0, net.config.vocab_size, (2, 41))
    targets = ids[:, 1:].clone()
    targets[0, 3] = IGNORE
    return net, ids[:, :-1], targets


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_losses_of_tokens_are_those_of_the_distribution_which_sums_to_one(name):
    net, ids, targets = model_and_batch(name)
    net.eval()
    log_p = net(ids).log_softmax(-1)
    if not net.config.copy_head:
        torch.testing.assert_close(net(ids).logsumexp(-1), torch.zeros(2, 40, dtype=torch.float64))
    nll = -log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0)
    torch.testing.assert_close(net.nll(ids, targets)[0], nll)
    torch.testing.assert_close(net.loss(ids, targets), nll.sum() / 79)


@pytest.mark.parametrize("name", ["engine", "no copy head", "attention", "whole groups"])
def test_gradients_are_those_of_the_distribution(name):
    net, ids, targets = model_and_batch(name)
    net.eval()
    log_p = net(ids).log_softmax(-1)
    expected = -log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0).sum() / 79
    leaves = list(net.parameters())
    outcomes = [torch.autograd.grad(loss, leaves) for loss in (net.loss(ids, targets), expected)]
    for (parameter, _), got, wanted in zip(net.named_parameters(), *outcomes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12, msg=lambda text, parameter=parameter: f"{parameter}: {text}")


def test_text_in_two_parts_continues_the_first():
    net, ids, _ = model_and_batch("engine")
    whole, (first, states) = net(ids), net.continue_from(ids[:, :17], None)
    second, _ = net.continue_from(ids[:, 17:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_where_the_rows_of_each_group_are_equal_it_starts_as_the_flat_output():
    torch.manual_seed(0)
    two, flat = (LanguageModel(model_config("phase1", TINY, copy_head=False, htt_output=form)).double() for form in ("two_level", "flat"))
    flat.load_state_dict(two.state_dict(), strict=False)
    for net in (two, flat):
        with torch.no_grad():
            net.embedding.tail.core_b[:] = net.embedding.tail.core_b[:1]
            net.embedding.tail.phase_b[:] = net.embedding.tail.phase_b[:1]
            net.embedding.tail.bias_b.zero_()
            net.embedding.weights.zero_()
            net.embedding.output_bias.copy_(torch.linspace(-3, 1, 503))
    ids = torch.randint(0, 503, (1, 20))
    torch.testing.assert_close(two(ids).log_softmax(-1), flat(ids).log_softmax(-1))


def test_everything_else_starts_as_in_the_flat_model_of_the_same_seed():
    states = []
    for form in ("two_level", "flat"):
        torch.manual_seed(0)
        states.append(LanguageModel(model_config("phase1", TINY, htt_output=form)).state_dict())
    two, flat = states
    assert two.keys() - flat.keys() == {f"embedding.groups.{name}" for name in ("rows", "bias", "down.weight", "up.weight")}
    assert all(torch.equal(two[name], tensor) for name, tensor in flat.items())


def test_the_matrices_of_the_second_level_are_none_of_the_tables():
    net = model_and_batch("engine")[0]
    matrices, table, vectors = (group["params"] for group in parameter_groups(net, TrainConfig()))
    assert all(any(p is part.weight for p in matrices) for part in (net.embedding.groups.down, net.embedding.groups.up)) and any(p is net.embedding.groups.rows for p in table)
    assert any(p is net.embedding.groups.bias for p in vectors)


def test_it_compiles_without_a_break():
    net, ids, targets = model_and_batch("engine", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    outcomes = [(loss, *torch.autograd.grad(loss, list(net.parameters()))) for loss in (net.loss(ids, targets), compiled(ids, targets))]
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected)


def test_ids_of_configurations_know_the_output_only_where_it_is_not_flat():
    flat, two = (model_config("phase1", EngineShape(), htt_output=form) for form in ("flat", "two_level"))
    assert flat.config_id == "000423cfa5a7" and two.config_id != flat.config_id
    dense = [model_config("baseline", EngineShape(), htt_output=form).config_id for form in ("flat", "two_level")]
    assert dense[0] == dense[1]


def test_the_default_table_is_ninety_percent_smaller_than_a_dense_one_with_it():
    with torch.device("meta"):
        table = LanguageModel(model_config("phase1", EngineShape(), htt_output="two_level")).parameter_counts()["embedding"]
    assert table <= 0.1 * 50257 * 512


def test_a_table_without_a_tail_has_no_groups():
    with pytest.raises(ValueError, match="--htt-output two_level needs rows past 16 x --htt-dense-rows=100"):
        model_config("phase1", TINY, htt_dense_rows=100)
