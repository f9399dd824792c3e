"""Where the logits start: a new model knows nothing of the text but its frequencies, and its first loss says so."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from phase1.config import EngineShape
from phase1.model import LanguageModel
from phase1.roster import START, model_config
from phase1.training.job import start_of

V = 3000
SHAPE = EngineShape(vocab_size=V, d_model=256, n_layers=2, n_heads=4, copy_window=16, htt_dense_rows=100, htt_groups=50, ar_ssm_window=8)
SMALL = {"row_norm": 0.02 * 16, "input_scale": 1.0}  # rows of standard deviation 0.02, no factor sqrt(D)
CALM = [SMALL, {"logit_scale": 0.1}, {"logit_scale": 0.1, "learnt_logit_scale": True}, {"logit_scale": 0.0, "learnt_logit_scale": True}]


def first_loss(config, statistics=None, targets=None):
    torch.manual_seed(0)
    net = LanguageModel(config, statistics).eval()
    ids = torch.randint(0, V, (2, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net.loss(ids[:, :-1], ids[:, 1:] if targets is None else targets).item()


@pytest.mark.parametrize("role", ["baseline", "phase1"])
@pytest.mark.parametrize("setting", CALM, ids=str)
def test_the_first_loss_is_near_log_v(role, setting):
    config = model_config(role, SHAPE, row_norm=1.0, input_scale=None)
    assert first_loss(config) > math.log(V) + 3  # the token that is read has a logit of about sqrt(D)
    assert abs(first_loss(replace(config, **setting)) - math.log(V)) < 0.7


@pytest.mark.parametrize("name", ["baseline", "phase1"])
@pytest.mark.parametrize("setting", CALM, ids=str)
def test_with_biases_at_log_frequency_it_is_near_the_entropy_of_single_tokens(name, setting):
    share = 1 / np.arange(1, V + 1)
    text = np.random.default_rng(0).choice(V, 40_000, p=share / share.sum())
    config = replace(model_config(name, SHAPE), **START | setting)
    targets = torch.from_numpy(text[-128:].reshape(2, 64))
    counts = np.bincount(text, minlength=V)
    expected = -np.log((counts + 1) / (len(text) + V))[text[-128:]].mean()
    assert abs(first_loss(config, start_of(config, text, 0, "cpu"), targets) - expected) < 0.7


def test_the_plain_transformer_starts_there_by_itself():
    assert abs(first_loss(model_config("baseline", SHAPE)) - math.log(V)) < 0.7


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_every_setting_of_the_start_changes_the_model_and_its_id(role):
    config = model_config(role, SHAPE)
    found = [config, *(replace(config, **change) for change in ({"row_norm": 0.3}, {"input_scale": 2.0}, {"logit_scale": 0.3}, {"learnt_logit_scale": True}))]
    assert len({c.config_id for c in found}) == 5
    assert len({first_loss(c) for c in found[:4]}) == 4
    torch.manual_seed(0)
    net = LanguageModel(found[4]).train()
    ids = torch.randint(0, V, (1, 9))
    net.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert net.logit_scale.grad.abs() > 0


@pytest.mark.parametrize("embedding", ["htt", "dense"])
def test_rows_are_as_long_as_the_setting_says(embedding):
    rows = []
    for norm in (1.0, 0.25):
        torch.manual_seed(0)
        rows.append(LanguageModel(model_config("phase1", SHAPE, embedding=embedding, row_norm=norm)).embedding.table(torch.float32))
    torch.testing.assert_close(rows[1], rows[0] / 4)


def test_the_factor_is_in_the_logits_and_in_every_loss():
    torch.manual_seed(0)
    net = LanguageModel(model_config("phase1", SHAPE, logit_scale=0.3, learnt_logit_scale=True)).double().eval()
    ids = torch.randint(0, V, (2, 9))
    expected = torch.nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(net.loss(ids[:, :-1], ids[:, 1:]), expected)
    torch.testing.assert_close(net.nll(ids[:, :-1], ids[:, 1:])[0].mean(), expected)
