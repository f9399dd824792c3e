"""A model of a user's own is checked before it is measured: every fault is found, by the check that is about it."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from phase1.commands import check_model as command
from phase1.config import ModelConfig
from phase1.measure import soundness
from phase1.measure.soundness import require_sound, sample_of
from phase1.roster import OWN
from phase1.runs import CheckModelRun
from phase1.trainable import OwnModel

V, T = 32, 24


class Right(nn.Module):
    """A small recurrent model; the faulty ones below differ from it in one thing each."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn, self.out = nn.Embedding(V, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, V)

    def forward(self, ids):
        return self.out(self.rnn(self.table(ids))[0])


class Own(Right):
    """The same, with a loss of its own."""

    def nll(self, ids, targets):
        scores = self(ids).log_softmax(-1)
        return -scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets >= 0, 0)

    def loss(self, ids, targets):
        return self.nll(ids, targets).sum() / (targets >= 0).sum()


class Constant(Right):
    def __init__(self):
        super().__init__()
        self.c = torch.ones(16)

    def forward(self, ids):
        return self.out(self.rnn(self.table(ids))[0] * self.c)


class ListedWeight(Right):
    def __init__(self):
        super().__init__()
        self.listed = [nn.Parameter(torch.ones(16))]

    def forward(self, ids):
        return self.out(self.rnn(self.table(ids))[0] * self.listed[0])


class StartsInFloat32(Right):
    def forward(self, ids):
        return self.out(self.rnn(self.table(ids), torch.zeros(1, len(ids), 16))[0])


class RoundsLogits(Right):
    def forward(self, ids):
        return super().forward(ids).float()


class RoundsLosses(Own):
    def nll(self, ids, targets):
        return super().nll(ids, targets).float()


class LeakByOne(Right):
    def forward(self, ids):
        return super().forward(F.pad(ids[:, 1:], (0, 1)))


class Bidirectional(Right):
    def forward(self, ids):
        h = self.rnn(self.table(ids))[0]
        return self.out(h + 0.1 * h.mean(1, keepdim=True))


class SmallLeak(Right):
    def forward(self, ids):
        h = self.rnn(self.table(ids))[0]
        weights = torch.full((ids.shape[1],) * 2, 1 / ids.shape[1])  # in float32, as masks are made
        return self.out(h + 5e-4 * weights.to(h.dtype) @ h)


class LeakBelowRounding(Right):
    def forward(self, ids):
        h = self.rnn(self.table(ids))[0]
        return self.out(h + 1e-7 * h.mean(1, keepdim=True))


class SmallLeakThatRounds(SmallLeak):
    def forward(self, ids):
        return super().forward(ids).float()


class LeakInBackward(Right):
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g + 0.1 * g.abs().mean() * ctx.saved_tensors[0].flip(1)

    def forward(self, ids):
        return self.out(self.Op.apply(self.rnn(self.table(ids))[0]))


class Sum(Own):
    def loss(self, ids, targets):
        return self.nll(ids, targets).sum()


class ScoresIgnored(Own):
    def loss(self, ids, targets):
        return super().loss(ids, targets.clamp(min=0))


class Shifted(Own):
    def nll(self, ids, targets):
        return super().nll(ids, targets.roll(-1, 1))


class Bits(Own):
    def nll(self, ids, targets):
        return super().nll(ids, targets) / math.log(2)


class Dropout(Right):
    def forward(self, ids):
        return self.out(F.dropout(self.rnn(self.table(ids))[0], 0.5, training=True))


class Remembers(Right):
    h = None

    def forward(self, ids):
        y, h = self.rnn(self.table(ids), None if self.h is None or self.h.shape[1] != len(ids) else self.h)
        self.h = h.detach()
        return self.out(y)


class KnowsItsLength(Right):
    def forward(self, ids):
        return super().forward(ids) * ids.shape[1] / 10


class Frozen(Right):
    def __init__(self):
        super().__init__()
        self.table.weight.requires_grad_(False)


class Dead(Right):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 4)


class NoLearning(Right):
    def forward(self, ids):
        return super().forward(ids) * 1e-4


def sample(cls):
    torch.manual_seed(0)
    config = ModelConfig(
        **(
            OWN
            | {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 1, "ar_ssm_max_rank": 4}
            | {"model": "some.module:made"}
        )
    )
    return sample_of(OwnModel(cls(), config), T)


def failed(found):
    return [check.name for check in (found if isinstance(found, list) else [found]) if check.status == "fail"]


CHECKS = ("moves", "causal_outputs", "causal_gradients", "loss_is_nats", "distribution", "uniform", "deterministic", "any_length", "precisions",
          "learns")  # fmt: skip


@pytest.mark.parametrize("model", [Right, Own])
def test_right_models_pass_every_check(model):
    assert [name for check in CHECKS for name in failed(getattr(soundness, check)(sample(model)))] == []


@pytest.mark.parametrize(
    ("model", "check", "name"),
    [
        (Constant, "moves", "every_tensor_moves"),
        (ListedWeight, "moves", "every_tensor_moves"),
        (StartsInFloat32, "moves", "moves_to_float64"),
        (RoundsLogits, "moves", "moves_to_float64"),
        (RoundsLosses, "moves", "moves_to_float64"),
        (LeakByOne, "causal_outputs", "causal"),
        (Bidirectional, "causal_outputs", "causal"),
        (SmallLeak, "causal_outputs", "causal"),
        (LeakBelowRounding, "causal_outputs", "causal"),
        (Bidirectional, "causal_gradients", "causal_gradients"),
        (LeakInBackward, "causal_gradients", "causal_gradients"),
        (Sum, "loss_is_nats", "loss_is_the_mean"),
        (ScoresIgnored, "loss_is_nats", "ignores_minus_100"),
        (Shifted, "causal_outputs", "causal"),
        (Bits, "distribution", "distribution"),
        (Bits, "uniform", "uniform_is_ln_v"),
        (Dropout, "deterministic", "deterministic"),
        (Remembers, "deterministic", "deterministic"),
        (KnowsItsLength, "any_length", "any_length"),
        (Frozen, "learns", "every_parameter_learns"),
        (Dead, "learns", "every_parameter_learns"),
        (NoLearning, "learns", "learns"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_fault_is_found_by_its_check(model, check, name):
    assert name in failed(getattr(soundness, check)(sample(model)))


def test_a_tensor_that_does_not_move_is_named_with_its_module():
    check = soundness.moves(sample(Constant))[0]
    assert "c of model (Constant)" in check.detail and "register_buffer" in check.detail


@pytest.mark.parametrize("model", [Right, Own, SmallLeak, SmallLeakThatRounds, StartsInFloat32])
def test_causality_has_the_limit_of_what_the_model_computes_in(model):
    exact = model not in (SmallLeakThatRounds, StartsInFloat32)  # which leaks less than rounding may, and which does not run
    check = soundness.causal_outputs(sample(model))
    assert check.limit == (soundness.EXACT_LEAK if exact else soundness.LEAK) and ("float64" in check.detail) == exact
    assert check.status == ("fail" if model is SmallLeak else "pass")


def test_a_leak_where_the_model_runs_is_found_though_its_copy_has_none(monkeypatch):
    monkeypatch.setattr(soundness, "in_float64", lambda text: sample(Right))
    check = soundness.causal_outputs(sample(LeakByOne))
    assert check.status == "fail" and check.limit == soundness.LEAK


def test_a_model_for_a_gpu_alone_is_not_judged_in_float64():
    class Kernel(Right):
        def forward(self, ids):
            raise RuntimeError("0 active drivers")

    found = soundness.moves(sample(Kernel))[1]
    assert found.status == "inconclusive" and "0 active drivers" in found.detail


@pytest.mark.parametrize("model", [LeakByOne, Bidirectional, SmallLeak, Sum, ScoresIgnored, Shifted])
def test_no_perplexity_of_a_model_that_sees_the_future_or_counts_otherwise(model):
    for dtype in (torch.float32, torch.bfloat16):
        require_sound(sample(Right).model, T, dtype)
        with pytest.raises(ValueError, match="may not be scored"):
            require_sound(sample(model).model, T, dtype)


def test_the_command_says_yes_and_no(tmp_path, monkeypatch, capsys):
    source = Path(__file__).read_text()
    (tmp_path / "checked_models.py").write_text(source.partition("class Own")[0].partition("V, T =")[2].join(
        ["import torch\nfrom torch import nn\nV, T =", "\n\ndef right():\n    return Right()\n\n\ndef wrong():\n"
         "    model = Right()\n    model.rnn.requires_grad_(False)\n    return model\n"]))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 1, "seq_length": T}
    try:
        assert command.main(CheckModelRun(own_model="checked_models:right", **sizes)) == 0
        out = capsys.readouterr().out
        assert "PASS  isolated" in out and "answer  yes" in out and "FAIL" not in out
        assert command.main(CheckModelRun(own_model="wrong=checked_models:wrong", **sizes)) == 1
        out = capsys.readouterr().out
        assert "FAIL  every_parameter_learns" in out and "rnn.weight" in out and "answer  no" in out
    finally:
        sys.modules.pop("checked_models", None)
