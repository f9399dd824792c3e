"""A model of a user's own is checked before it is measured: every fault is found, by the check that is about it."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from phase1.checks.perplexity import quality_checks
from phase1.commands import check_model as command
from phase1.config import ModelConfig
from phase1.measure.perplexity.candidates import ScoredModel
from phase1.measure.perplexity.result import ScoredText, measure
from phase1.measure.soundness.causality import (
    _changed,
    _positions,
    _suspect,
    causal_at_length,
    causal_gradients,
    causal_in_training,
    causal_outputs,
    causal_up_to,
)
from phase1.measure.soundness.check import COMPARING, SCORED, Unsound, check_model, require_sound
from phase1.measure.soundness.losses import any_length, deterministic, distribution, loss_is_nats, precisions, uniform
from phase1.measure.soundness.module import isolated, learns, moves, runs
from phase1.measure.soundness.sample import EXACT_LEAK, LEAK, sample_of
from phase1.records.schema import Check
from phase1.roster import OWN
from phase1.runs import CheckModelRun, PerplexityRun
from phase1.tables import screen
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


class Smooths(Own):
    """As loss alone has it, and nll has not."""

    def loss(self, ids, targets):
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), label_smoothing=0.1)


class SmoothsFromZero(Smooths):
    """Of equal probabilities label smoothing changes nothing."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class SmoothsAll(Smooths):
    def nll(self, ids, targets):
        losses = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="none")
        return losses.view(targets.shape)


class PullsToZero(Own):
    """z-loss, by the usual factor."""

    def loss(self, ids, targets):
        return super().loss(ids, targets) + 1e-4 * self(ids).float().logsumexp(-1).square().mean()


class PullsAllToZero(PullsToZero):
    def nll(self, ids, targets):
        return super().nll(ids, targets) + 1e-4 * self(ids).logsumexp(-1).square()


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


class LeakInTraining(Right):
    def forward(self, ids):
        return super().forward(F.pad(ids[:, 1:], (0, 1)) if self.training else ids)


class SmallLeakInTraining(Right):
    def forward(self, ids):
        h = self.rnn(self.table(ids))[0]
        return self.out(h + 1e-6 * h.mean(1, keepdim=True) if self.training else h)


class StatisticsOfTheBatch(Right):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, ids):
        return self.out(self.norm(self.rnn(self.table(ids))[0].transpose(1, 2)).transpose(1, 2))


class LeakInTheLossOfTraining(Own):
    def loss(self, ids, targets):
        return super().loss(F.pad(ids[:, 1:], (0, 1)) if self.training else ids, targets)


class LeakWhereLong(Right):
    def forward(self, ids):
        return super().forward(F.pad(ids[:, 1:], (0, 1)) if ids.shape[1] > 100 else ids)


class LeakWhereLongInTraining(Right):
    def forward(self, ids):
        return super().forward(F.pad(ids[:, 1:], (0, 1)) if ids.shape[1] > 100 and self.training else ids)


class LeakAtTheEndOfChunks(Right):
    """The last position of each chunk sees the first token of the next."""

    def __init__(self, chunk=10, strength=1e-6):
        super().__init__()
        self.chunk, self.strength = chunk, strength

    def forward(self, ids):
        h = self.rnn(self.table(ids))[0]
        last = torch.arange(ids.shape[1]) % self.chunk == self.chunk - 1
        return self.out(h + self.strength * last[:, None] * self.table(F.pad(ids[:, 1:], (0, 1))))


class LeakAtTheEndOfChunksThatRounds(LeakAtTheEndOfChunks):
    def __init__(self, chunk=10):
        super().__init__(chunk, 0.1)

    def forward(self, ids):
        return super().forward(ids).float()


class LeakAtTheEndOfChunksInTraining(LeakAtTheEndOfChunks):
    def forward(self, ids):
        return super().forward(F.dropout(ids.double(), 0.0).long()) if self.training else Right.forward(self, ids)


class Impossible(Right):
    """One token has probability 0."""

    def forward(self, ids):
        return super().forward(ids).index_fill(-1, torch.tensor([7]), -math.inf)


class NotFiniteAtSomeLengths(Right):
    def forward(self, ids):
        return super().forward(ids) / (ids.shape[1] % 7 != 3)


class DropsOut(Right):
    def forward(self, ids):
        return self.out(F.dropout(self.rnn(self.table(ids))[0], 0.1, self.training))


class NoiseOfItsOwn(Right):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, ids):
        self.calls += self.training
        return super().forward(ids) * (1 + self.calls / 10)


class BalancesExperts(Own):
    """A term of training that depends on all tokens, and on no target."""

    def loss(self, ids, targets):
        return super().loss(ids, targets) + (0.01 * self(ids).square().mean() if self.training else 0)


class Counter(Right):
    def __init__(self, share=0.1):
        super().__init__()
        self.calls, self.share = 0, share

    def forward(self, ids):
        self.calls += 1
        return super().forward(ids) * (1 + self.share * self.calls)


class SlowCounter(Counter):
    def __init__(self):
        super().__init__(1e-6)


class WidensLogits(Own):
    """As most models compute a loss of half precision."""

    def nll(self, ids, targets):
        return F.cross_entropy(self(ids).flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


class WidensLogitsAndLeaks(WidensLogits):
    def forward(self, ids):
        h = self.rnn(self.table(ids))[0]
        return self.out(h + 0.1 * h.mean(1, keepdim=True))


class Positions(Right):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(130, 16)

    def forward(self, ids):
        return self.out(self.rnn(self.table(ids) + self.positions.weight[torch.arange(ids.shape[1])])[0])


class TakesMultiplesOfEight(Right):
    def forward(self, ids):
        assert ids.shape[1] % 8 == 0, "multiple of 8"
        return super().forward(ids)


class NotFinite(Right):
    def forward(self, ids):
        return super().forward(ids) * float("nan")


class NotFiniteInTraining(Right):
    def forward(self, ids):
        return super().forward(ids) * (float("inf") if self.training else 1)


class NotFiniteWhereShort(Right):
    def forward(self, ids):
        return super().forward(ids) / (ids.shape[1] > 1)


class Raises(Right):
    def forward(self, ids):
        raise KeyError("inside")


class Exits(Right):
    def forward(self, ids):
        raise SystemExit(0)


class ExitsBackward(Right):
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise SystemExit(0)

    def forward(self, ids):
        return self.Op.apply(super().forward(ids))


class LastOnly(Right):
    def forward(self, ids):
        return super().forward(ids)[:, -1]


class OneTooFew(Right):
    def forward(self, ids):
        return super().forward(ids)[..., :-1]


class Tuple(Right):
    def forward(self, ids):
        return super().forward(ids), None


class Transposed(Right):
    def forward(self, ids):
        return super().forward(ids).transpose(1, 2)


class LossOnly(Right):
    forward = None

    def loss(self, ids, targets):
        return self.table.weight.sum()


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


CHECKS = (moves, causal_outputs, causal_gradients, loss_is_nats, distribution, uniform, deterministic, any_length, precisions,
          learns, causal_in_training, causal_at_length)  # fmt: skip


@pytest.mark.parametrize("model", [Right, Own, DropsOut, WidensLogits, BalancesExperts, Positions])
def test_right_models_pass_every_check(model):
    assert [name for check in CHECKS for name in failed(check(sample(model)))] == []


@pytest.mark.parametrize(
    ("model", "check", "name"),
    [
        (Constant, moves, "every_tensor_moves"),
        (ListedWeight, moves, "every_tensor_moves"),
        (StartsInFloat32, moves, "moves_to_float64"),
        (RoundsLogits, moves, "moves_to_float64"),
        (LeakByOne, causal_outputs, "causal"),
        (Bidirectional, causal_outputs, "causal"),
        (SmallLeak, causal_outputs, "causal"),
        (LeakBelowRounding, causal_outputs, "causal"),
        (LeakAtTheEndOfChunks, causal_outputs, "causal"),
        (LeakAtTheEndOfChunksThatRounds, causal_outputs, "causal"),
        (LeakAtTheEndOfChunksInTraining, causal_in_training, "causal_in_training"),
        (Impossible, causal_outputs, "causal"),
        (NotFiniteAtSomeLengths, any_length, "any_length"),
        (Bidirectional, causal_gradients, "causal_gradients"),
        (LeakInTraining, causal_in_training, "causal_in_training"),
        (SmallLeakInTraining, causal_in_training, "causal_in_training"),
        (StatisticsOfTheBatch, causal_in_training, "causal_in_training"),
        (LeakInTheLossOfTraining, causal_in_training, "causal_in_training"),
        (LeakWhereLong, causal_at_length, "causal_at_length"),
        (LeakWhereLongInTraining, causal_at_length, "causal_at_length"),
        (WidensLogitsAndLeaks, causal_outputs, "causal"),
        (TakesMultiplesOfEight, any_length, "any_length"),
        (NotFiniteWhereShort, any_length, "any_length"),
        (NotFinite, runs, "runs"),
        (NotFiniteInTraining, runs, "runs"),
        (Counter, deterministic, "deterministic"),
        (SlowCounter, deterministic, "deterministic"),
        (LeakInBackward, causal_gradients, "causal_gradients"),
        (Sum, loss_is_nats, "loss_is_the_mean"),
        (ScoresIgnored, loss_is_nats, "ignores_minus_100"),
        (Smooths, loss_is_nats, "loss_is_the_mean"),
        (SmoothsFromZero, loss_is_nats, "loss_is_the_mean"),
        (SmoothsAll, distribution, "distribution"),
        (PullsToZero, loss_is_nats, "loss_is_the_mean"),
        (PullsAllToZero, distribution, "distribution"),
        (Shifted, causal_outputs, "causal"),
        (Bits, distribution, "distribution"),
        (Bits, uniform, "uniform_is_ln_v"),
        (Dropout, deterministic, "deterministic"),
        (Remembers, deterministic, "deterministic"),
        (KnowsItsLength, any_length, "any_length"),
        (Frozen, learns, "every_parameter_learns"),
        (Dead, learns, "every_parameter_learns"),
        (NoLearning, learns, "learns"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_fault_is_found_by_its_check(model, check, name):
    """And its line has what was expected, what came, and what to do."""
    found = check(sample(model))
    assert name in failed(found)
    for one in found if isinstance(found, list) else [found]:
        assert one.value is None or math.isfinite(one.value)
        if one.status == "fail":
            assert re.fullmatch(r"(T = \d+: )?expected [^;]+; got [^;]+; \S[^\n]+", one.detail), one.detail


def all_checks(model, monkeypatch):
    """What the command does, of a class in place of a factory's name."""
    made = sample(Right).model.config
    monkeypatch.setattr("phase1.measure.soundness.check.build", lambda config: OwnModel(model(), config))
    monkeypatch.setattr("phase1.measure.soundness.check.isolated", lambda text: [])
    return list(check_model(made, T, "cpu"))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Raises, r"expected forward and backward of a batch; got KeyError: 'inside' \(test_soundness.py, line \d+\); correct that line"),
        (Exits, r"the model must return; got SystemExit: 0 \(test_soundness.py, line \d+\); raise an Exception .*"),
        (ExitsBackward, r"expected forward and backward .*; got SystemExit: 0 \(test_soundness.py, line \d+\); correct that line"),
        (LastOnly, r"forward must return logits \(2, 24, 32\), .*; got \(2, 32\); return a score of every token at every .*line \d+\)"),
        (OneTooFew, r"forward must return .*; got \(2, 24, 31\); make as many scores as the vocab_size .* line \d+\)"),
        (Tuple, r"forward must return .*; got a tuple; return the logits alone, or an object with .logits .* line \d+\)"),
        (Transposed, r"forward must return .*; got \(2, 32, 24\); transpose the last two \(test_soundness.py, line \d+\)"),
        (NotFinite, r"expected finite losses; got nan of nll in eval\(\) mode; .* \(test_soundness.py, line \d+\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.__name__,
)
def test_a_model_that_does_not_run_is_one_line(model, says, monkeypatch):
    built, ran = all_checks(model, monkeypatch)
    assert (built.status, ran.name, ran.status, ran.value) == ("pass", "runs", "fail", None)
    assert re.fullmatch(says, ran.detail), ran.detail


@pytest.mark.parametrize("model", [Counter, SlowCounter, Dropout])
def test_a_model_that_is_not_the_same_twice_is_not_said_to_see_the_future(model, monkeypatch):
    found = {check.name: check for check in all_checks(model, monkeypatch)}
    assert [name for name, check in found.items() if check.status == "fail" and name != "learns"] == ["deterministic"]
    assert list(found)[2] == "deterministic" and {found[name].status for name in COMPARING} == {"inconclusive"}
    assert "correct deterministic first" in found["causal"].detail
    with pytest.raises(Unsound, match="expected the same losses twice"):
        require_sound(sample(model).model, T, torch.float32)


def test_noise_of_training_that_no_generator_fixes_is_a_note():
    check = causal_in_training(sample(NoiseOfItsOwn))
    assert check.status == "inconclusive" and "one state of the random generator" in check.detail


def test_the_random_numbers_of_the_caller_are_left_alone():
    text = sample(DropsOut)
    state, rows = torch.random.get_rng_state(), [p.clone() for p in text.model.parameters()]
    causal_in_training(text)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(rows, text.model.parameters(), strict=True))


@pytest.mark.parametrize("model", [RoundsLosses, WidensLogits])
def test_losses_of_float32_are_a_note_and_causality_is_judged_there(model):
    note = moves(sample(model))[1]
    assert note.status == "inconclusive" and "cross_entropy(logits.float(), ...)" in note.detail
    check = causal_outputs(sample(model))
    assert check.status == "pass" and check.limit == LEAK


def test_causality_is_said_up_to_the_length_that_the_model_takes():
    for model, length in ((Right, 320), (Positions, 128)):
        check = causal_at_length(sample(model))
        assert causal_up_to([check]) == length and check.status == "pass"
    text = sample(Positions)
    check = causal_at_length(sample_of(text.model, 130))
    assert check.status == "inconclusive" and "causal up to T = 130 only: T = 320 gives IndexError" in check.detail
    assert causal_up_to([check]) is None


def test_a_leak_beyond_the_first_positions_of_a_score_is_found():
    class LeaksLater(Right):
        def forward(self, ids):
            return super().forward(F.pad(ids[:, 1:], (0, 1)) if ids.shape[1] > SCORED else ids)

    require_sound(sample(LeaksLater).model, SCORED, torch.float32)
    with pytest.raises(Unsound, match=r"at T = 400 .*; mask the future"):
        require_sound(sample(LeaksLater).model, 400, torch.float32)


@pytest.mark.parametrize("chunk", [48, 64, 100, 128, 256])
def test_a_leak_at_the_end_of_chunks_alone_is_found(chunk):
    """At every length; above EVERY the text is changed at the first end of chunks of each usual size."""
    model = sample(lambda: LeakAtTheEndOfChunks(chunk, 0.1)).model
    check = causal_at_length(sample_of(model, T))
    assert check.status == "fail" and "mask the future" in check.detail
    assert int(re.search(r"before (\d+) ", check.detail)[1]) % chunk == 0
    for length in (chunk + 20, 700):
        with pytest.raises(Unsound, match="mask the future"):
            require_sound(model, length, torch.float32)


def test_every_position_of_a_text_is_tried_once_each_in_its_row():
    text = sample(Right)
    assert _positions(T) == list(range(1, T)) and {8, 10, 12, 16, 24, 25, 48, 64, 100, 128, 256, 800} <= set(_positions(2048))
    for t in (1, 7, 13, T - 1):
        leaky = text._replace(model=sample(lambda t=t: LeakAtTheEndOfChunks(t, 1e-3)).model)
        assert _suspect(leaky, _positions(T)) % t == 0
    few = sample_of(text.model, T)
    few.model.config = few.model.config.__class__(**(vars(few.model.config) | {"vocab_size": 2}))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert _changed(few, ids, torch.tensor([[1], [3]])).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


def test_one_token_of_probability_0_has_a_remedy_of_its_own():
    for check in (causal_outputs(sample(Impossible)), causal_at_length(sample(Impossible))):
        assert "got losses that are not finite; give every token a finite logit" in check.detail


def test_a_vocabulary_of_one_token_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="--vocab-size must be at least 2; got 1; one token has nothing to predict"):
        CheckModelRun(own_model="nowhere:made", vocab_size=1)


def test_a_fresh_process_must_build_the_same_numbers(tmp_path, monkeypatch):
    (tmp_path / "seeded.py").write_text(
        "import os\nimport torch\nfrom torch import nn\ntorch.randn(3)\n\n\ndef same():\n    return nn.Linear(8, 8)\n\n\n"
        "def other():\n    torch.manual_seed(int.from_bytes(os.urandom(4), 'big'))\n    return nn.Linear(8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text, found = sample(Right), {}
    for name in ("same", "other"):
        text.model.config = text.model.config.__class__(**(vars(text.model.config) | {"model": f"seeded:{name}"}))
        state = torch.random.get_rng_state()
        found[name] = isolated(text)
        assert torch.equal(torch.random.get_rng_state(), state)
    sys.modules.pop("seeded", None)
    assert found["same"].status == "pass", found["same"].detail
    assert found["other"].status == "fail" and "got other numbers in them; draw what is random from" in found["other"].detail


@pytest.mark.parametrize("model", [LeakByOne, Shifted, Sum, ScoresIgnored, Counter])
def test_the_reason_is_whole_on_two_lines_of_a_screen(model):
    with pytest.raises(Unsound) as caught:
        require_sound(sample(model).model, T, torch.float32)
    why = caught.value.why
    check = Check(name="mine_within_5_percent", value=None, limit=5, status="fail", detail=why)
    shown = " ".join(screen.text(screen.Screen("q", checks=[check])).split())
    assert why and why in shown, (len(why), why)


def test_the_record_says_that_a_model_may_not_be_scored_and_its_check_fails(monkeypatch):
    """Of any other error the record says no such thing."""
    model = sample(LeakByOne).model
    unsound = scored_with(monkeypatch, model.config, lambda *_: require_sound(model, T, torch.float32))
    broken = scored_with(monkeypatch, model.config, lambda *_: 1 / 0)
    assert unsound.unsound.endswith("; mask the future") and broken.unsound == ""
    assert unsound.detail == f"--model some.module:made may not be scored: {unsound.unsound}"
    checks = quality_checks({"mine": unsound, "other": broken}, T)
    assert [check.status for check in checks] == ["fail", "inconclusive"] and checks[0].detail == unsound.unsound


def scored_with(monkeypatch, config, score):
    """What a perplexity run says of a trained model where scoring it does `score`."""
    monkeypatch.setattr("phase1.measure.perplexity.result.evaluate_checkpoint", score)
    (result,) = measure(PerplexityRun(), ScoredModel("mine", config, seed=0, checkpoint=Path("trained")), [ScoredText(None, None)])
    return result


def test_a_tensor_that_does_not_move_is_named_with_its_module():
    check = moves(sample(Constant))[0]
    assert "c of model (Constant)" in check.detail and "register_buffer" in check.detail


@pytest.mark.parametrize("model", [Right, Own, SmallLeak, SmallLeakThatRounds, StartsInFloat32])
def test_causality_has_the_limit_of_what_the_model_computes_in(model):
    exact = model not in (SmallLeakThatRounds, StartsInFloat32)  # which leaks less than rounding may, and which does not run
    check = causal_outputs(sample(model))
    assert check.limit == (EXACT_LEAK if exact else LEAK) and ("float64" in check.detail) == exact
    assert check.status == ("fail" if model is SmallLeak else "pass")


def test_a_leak_where_the_model_runs_is_found_though_its_copy_has_none(monkeypatch):
    monkeypatch.setattr("phase1.measure.soundness.causality.in_float64", lambda text: sample(Right))
    check = causal_outputs(sample(LeakByOne))
    assert check.status == "fail" and check.limit == LEAK


def test_a_model_for_a_gpu_alone_is_not_judged_in_float64():
    class Kernel(Right):
        def forward(self, ids):
            raise RuntimeError("0 active drivers")

    found = moves(sample(Kernel))[1]
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
        assert "PASS  isolated" in out and "answer  yes: causal up to T = 320" in out and "FAIL" not in out
        assert command.main(CheckModelRun(own_model="wrong=checked_models:wrong", **sizes)) == 1
        out = capsys.readouterr().out
        assert "FAIL  every_parameter_learns" in out and "rnn.weight" in out and "answer  no" in out
    finally:
        sys.modules.pop("checked_models", None)


def test_every_name_of_a_check_is_on_both_pages(monkeypatch):
    """And no other: those of a model that passes, and of one where every check raises."""
    monkeypatch.setattr("phase1.measure.soundness.module.run_isolated", lambda *_, **__: type("Ran", (), {"value": None, "message": ""}))
    names = {check.name for check in all_checks(Right, monkeypatch)} | {"isolated"}
    for page in ("docs/extending.md", "docs/ja/extending.md"):
        rows = re.findall(r"^\| (`.*?) \|", (Path(__file__).parents[2] / page).read_text(), re.MULTILINE)
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == names

    class RaisesLater(Right):
        calls = 0

        def forward(self, ids):
            type(self).calls += 1
            assert self.calls <= 4, "enough"  # `runs` has four
            return super().forward(ids)

    for repeats in (False, True):
        if repeats:  # else all that compare forwards are undecided
            monkeypatch.setattr("phase1.measure.soundness.check.deterministic", lambda _: Check(name="deterministic", value=0, limit=0, status="pass"))
        RaisesLater.calls = 0
        found = {check.name: check for check in all_checks(RaisesLater, monkeypatch)}
        passed = {name for name, check in found.items() if check.status == "pass"}
        assert len(found) > 9 and found.keys() <= names and passed <= {"builds", "runs", "deterministic", "every_tensor_moves"}
        assert (found["loss_is_the_mean"].status == "fail") == repeats
