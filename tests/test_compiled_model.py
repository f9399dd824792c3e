"""The loss of a whole model as one compiled graph, and of a micro batch without a scored target."""

import pytest
import torch

from phase1.config import EngineShape
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE
from phase1.roster import ROLES, model_config

TINY = EngineShape(vocab_size=503, d_model=32, n_layers=1, n_heads=2, htt_dense_rows=16, htt_groups=40, ar_ssm_max_rank=8, htt_rank=8)
OPTIMIZED = [role for role in ROLES if role != "baseline"]


def model_and_batch(role, **overrides):
    torch.manual_seed(0)
    net = LanguageModel(model_config(role, TINY, **overrides))
    ids = torch.randint(0, 503, (2, 41))
    targets = ids[:, 1:].clone()
    targets[0, 3] = IGNORE
    return net, ids[:, :-1], targets


@pytest.mark.parametrize("role", OPTIMIZED)
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_the_loss_compiles_without_a_break_and_is_the_same(role, recompute):
    net, ids, targets = model_and_batch(role, recompute=recompute)
    torch._dynamo.reset()
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    outcomes = []
    for loss in (net.loss(ids, targets), compiled(ids, targets)):
        outcomes.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("role", ROLES)
def test_a_micro_batch_without_a_scored_target_has_no_gradient(role):
    net, ids, targets = model_and_batch(role, rank_penalty=0.0)
    net.loss(ids, targets.fill_(IGNORE)).backward()
    assert all((parameter.grad == 0).all() for parameter in net.parameters() if parameter.grad is not None)
