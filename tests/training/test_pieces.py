"""Training piece by piece is training on whole sequences: loss and every gradient, in float64."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from phase1.config import EngineShape, TrainConfig
from phase1.layers import ar_ssm
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.runs import TrainRun
from phase1.training import graphed_pieces
from phase1.training.compiler import compile_losses
from phase1.training.micro_batch import MicroBatch
from phase1.training.pieces import Pieces, bounds
from phase1.training.step import make_train_state, train_step

TINY = EngineShape(
    vocab_size=300, d_model=32, n_layers=2, n_heads=2, ar_ssm_max_rank=8, ar_ssm_min_rank=2, ar_ssm_window=8, copy_window=24,
    htt_rank=4, htt_dense_rows=16, htt_groups=16,
)  # fmt: skip
FORMS = {
    "flat": {},
    "not recomputed": {"recompute": "none"},
    "two_level": {"htt_output": "two_level"},
    "dense": {"embedding": "dense"},
    "materialized, no copy head": {"loss": "materialized", "copy_head": False},
    "no window": {"ar_ssm_window": 0},
}


ONE_LAYER = {"n_layers": 1, "copy_window": 9}
FUSED = replace(TINY, n_layers=1, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=10)


def model_of(**form) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(model_config("phase1", TINY, **form)).double().train()
    for p in model.parameters():  # nothing at 0, where faults hide
        if not p.abs().max():
            torch.nn.init.normal_(p, std=0.2)
    return model


def text(T=53, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (B, T), generator=generator)
    ids = torch.where(torch.rand(B, T, generator=generator) < 0.5, ids % 7, ids)  # some tokens come again
    targets = torch.roll(ids, -1, 1)
    targets[:, 30:41] = -100  # a whole piece of 11 without a target, when T = 41 + 11 n
    return ids, targets


def outcome(passes: MicroBatch, ids, targets):
    passes.model.zero_grad(set_to_none=not isinstance(passes, graphed_pieces.GraphedPieces))
    share, part = (torch.tensor(x, dtype=torch.float64, device=ids.device) for x in (0.7, 0.4))
    objective, loss = passes.forward(ids, targets, share, part)
    passes.backward(objective)
    return loss.detach(), {name: p.grad.clone() for name, p in passes.model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("B", [2, 3], ids=["loss first", "loss piece by piece"])
@pytest.mark.parametrize("length", [1, 5, 11, 16, 52, 53, 100])
def test_loss_and_every_gradient_are_those_of_the_whole_step(form, length, B):
    if length == 1 and (form != "flat" or B == 3):
        pytest.skip("slow, and one form shows it")
    model = model_of(**FORMS[form])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    pieces, batch = Pieces(model, scaler, torch.float32, length), text(12 if length == 1 else 53, B)
    same(outcome(pieces, *batch), outcome(MicroBatch(model, scaler, torch.float32), *batch))


class Overwritten(graphed_pieces.Launched):
    """A function as a graph would run it: its inputs are copied, and what a launch gave is gone at the next one."""

    given: list = []

    def __init__(self, function, inputs, pool):
        self.inputs, self.function = [tensor.clone() for tensor in inputs], function
        function(*self.inputs)  # as a capture does, but for its results

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        outputs = self.function(*self.inputs)
        for tensor in Overwritten.given:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        Overwritten.given = [tensor.clone() for tensor in outputs]
        return Overwritten.given


@pytest.mark.parametrize("form", ["flat", "two_level", "dense"])
@pytest.mark.parametrize("B", [2, 3], ids=["loss first", "loss piece by piece"])
def test_what_graphs_of_pieces_compute_is_kept_until_it_is_used(monkeypatch, form, B):
    monkeypatch.setattr(graphed_pieces, "Launched", Overwritten)
    monkeypatch.setattr(graphed_pieces, "beside", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, scaler = model_of(**FORMS[form]), torch.amp.GradScaler("cpu", enabled=False)
    graphed = graphed_pieces.GraphedPieces(Pieces(model, scaler, torch.float32, 16))
    whole = MicroBatch(copy.deepcopy(model), scaler, torch.float32)
    for seed, T in enumerate((53, 53, 69, 53, 16)):  # of other pieces as long as these, and of one
        batch = text(T, B, seed)
        same(outcome(graphed, *batch), outcome(whole, *batch))
    model.zero_grad(set_to_none=True)
    with pytest.raises(AssertionError, match="zeroed, never freed"):  # a graph would add to what is no more
        outcome(graphed, *batch)


def same(found, wanted):
    (ours, theirs), (loss, gradients) = found, wanted
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=1e-12)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_only_the_first_piece_has_another_length():
    assert bounds(53, 16) == [0, 5, 21, 37, 53]
    assert bounds(64, 16) == [0, 16, 32, 48, 64] and bounds(16, 16) == [0, 16] and bounds(7, 16) == [0, 7]


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_a_state_says_nothing_of_how_far_the_text_has_come_so_that_one_function_is_compiled_for_all_pieces(recompute):
    model, (ids, targets) = model_of(**ONE_LAYER, recompute=recompute), text(T=36, B=1)
    torch._dynamo.reset()
    compile_losses(model, pieces=True, backend=(counter := CompileCounter()))
    plain = Pieces(model_of(**ONE_LAYER), torch.amp.GradScaler("cpu", enabled=False), torch.float32, 9)
    for _ in range(2):
        pieces = Pieces(model, torch.amp.GradScaler("cpu", enabled=False), torch.float32, 9)
        torch.testing.assert_close(outcome(pieces, ids, targets)[0], outcome(plain, ids, targets)[0])
    assert counter.frame_count == 2 * 2 + 1  # outputs and gradients, of the first piece and of all others; and the loss


def test_no_more_is_compiled_where_the_copy_heads_window_takes_many_pieces_to_fill():
    shape = ONE_LAYER | {"copy_window": 36}
    model, (ids, targets) = model_of(**shape), text(T=72, B=1)
    torch._dynamo.reset()
    compile_losses(model, pieces=True, backend=(counter := CompileCounter()))
    pieces, plain = (Pieces(m, torch.amp.GradScaler("cpu", enabled=False), torch.float32, 9) for m in (model, model_of(**shape)))
    torch.testing.assert_close(outcome(pieces, ids, targets)[0], outcome(plain, ids, targets)[0])
    assert counter.frame_count == 2 * 2 + 1


def test_a_training_step_in_pieces_is_the_step_of_whole_sequences():
    outcomes = []
    for length in (None, 16):
        model = model_of()
        state = make_train_state(model, TrainConfig(piece_length=length), "cpu")
        batch, more = text(), text(seed=1)
        losses = [train_step(state, [batch, more]).item() for _ in range(2)]
        outcomes.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-6)
    for ours, theirs in zip(outcomes[0][1], outcomes[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # Adam's steps of 3e-3 are as long for tiny gradients


def test_half_precision_keeps_its_types_across_pieces():
    """bfloat16 on the CPU: states in half precision, gradients close to those of the whole step."""
    torch.manual_seed(0)
    model = LanguageModel(model_config("phase1", TINY)).train()
    batch, scaler = text(), torch.amp.GradScaler("cpu", enabled=False)
    _, wanted = outcome(MicroBatch(model, scaler, torch.bfloat16), *batch)
    _, found = outcome(Pieces(model, scaler, torch.bfloat16, 16), *batch)
    total = sum(g.square().sum() for g in wanted.values()) ** 0.5
    assert sum((found[name] - g).square().sum() for name, g in wanted.items()) ** 0.5 < 0.05 * total


def test_attention_trains_on_whole_sequences():
    model = LanguageModel(model_config("baseline", TINY))
    assert type(make_train_state(model, TrainConfig(piece_length=16), "cpu").micro_batch) is MicroBatch
    with pytest.raises(ValueError, match="a state that does not grow; got --mixer attention"):
        TrainRun(mixer="attention", piece_length=16)
    with pytest.raises(ValueError, match="--piece-length must be greater than 0"):
        TrainRun(piece_length=0)


def test_pieces_of_the_fused_operator_are_its_whole_sequences(monkeypatch):
    """In Triton's interpreter without a GPU; float32, whose rounding a state in lower precision would exceed."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = LanguageModel(model_config("phase1", FUSED)).train()
    batch, scaler = text(T=24, B=1), torch.amp.GradScaler("cpu", enabled=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = model.to(device), [part.to(device) for part in batch]
    with monkeypatch.context() as patch:
        patch.setattr(ar_ssm, "fused_runs", lambda *_: False)
        _, wanted = outcome(MicroBatch(model, scaler, torch.float32), *batch)
    monkeypatch.setattr(ar_ssm, "fused_runs", lambda *_: True)
    _, found = outcome(Pieces(model, scaler, torch.float32, 14), *batch)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name
