"""One sequence over several ranks: the loss and every gradient are those of one process, in float64 (gloo)."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from phase1.layers.ar_ssm import ARSSM
from phase1.training import context_parallel
from phase1.training.context_parallel import Context, ContextMicroBatch, faded, stretches
from phase1.training.micro_batch import MicroBatch
from phase1.training.pieces import Pieces
from tests.training.test_pieces import FORMS, model_of, outcome, text

CASES = {
    "flat": {},
    "two_level": FORMS["two_level"],
    "dense, no copy head": {"embedding": "dense", "copy_head": False},
    "recomputed": {"recompute": "block"},
    "faded": {"ar_ssm_memory": 1, "recompute": "none"},  # a stretch is longer than 38 times the memory
    "all faded": {"ar_ssm_memory": 1, "recompute": "none"},  # all stretches are longer than 22 times that
    "no window": {"ar_ssm_window": 0},
}
LENGTHS = {2: [(30, 23), (50, 3)], 4: [(7, 20, 2, 24), (1, 1, 50, 1)]}
ALL_FADED = [(27, 26)]
FEWER = ("flat", "faded")  # of four ranks


def worker(rank, size, folder):
    """Every case on one rank; the largest error of each in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    worst = {}
    for name in CASES if size == 2 else FEWER:
        form = CASES[name]
        model, (ids, targets) = model_of(**form), text()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss, wanted = outcome(MicroBatch(model, scaler, torch.float32), ids, targets)
        all_faded = name == "all faded"
        context_parallel.faded = (lambda dtype: 22.0) if all_faded else faded  # e^-22 is below what is asked for
        for lengths in ALL_FADED if all_faded else LENGTHS[size]:
            context = Context(lengths, rank)
            own = slice(context.start, context.start + lengths[rank])
            scored = (targets[:, own] != -100).sum().double() / (targets != -100).sum()
            passes = ContextMicroBatch(MicroBatch(model, scaler, torch.float32), context)
            model.zero_grad()
            objective, part = passes.forward(
                ids[:, own], targets[:, own], 0.7 * scored, torch.tensor(0.4 * lengths[rank] / 53).double()
            )
            passes.backward(objective)
            total = part.detach().clone()
            dist.all_reduce(total)
            errors = {"loss": abs(total - loss).item()}
            for parameter, p in model.named_parameters():
                found = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(found)
                errors[parameter] = ((found - wanted[parameter]).norm() / wanted[parameter].norm()).item()
            worst[f"{name} {lengths}"] = max(errors.items(), key=lambda item: item[1])
    if rank == 0:
        Path(folder, f"worst{size}.json").write_text(json.dumps(worst))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed")
@pytest.mark.parametrize("size", LENGTHS)
def test_gradients_of_one_sequence_over_ranks_are_those_of_one_process(size, tmp_path):
    method = "spawn" if torch.cuda.is_available() else "fork"  # which has imported all, but takes no GPU along
    mp.start_processes(worker, args=(size, str(tmp_path)), nprocs=size, start_method=method)
    worst = json.loads((tmp_path / f"worst{size}.json").read_text())
    assert len(worst) == (len(CASES) * 2 - 1 if size == 2 else len(FEWER) * 2)
    for case, (name, error) in worst.items():
        assert error < 1e-9, f"{case}: {name}"


def test_stretches_are_as_equal_as_can_be():
    assert stretches(10, 4) == [3, 3, 2, 2] and stretches(4, 4) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="over 4 ranks must have as many tokens; got 3"):
        stretches(3, 4)


def test_what_has_faded_is_a_quarter_of_the_rounding_of_the_inputs():
    found = [context_parallel.faded(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    assert found == pytest.approx([math.log(4 * 2**bits) for bits in (8, 11, 24, 53)])


def test_what_a_long_stretch_leaves_is_what_its_last_positions_leave(monkeypatch):
    """By the fused operator, in Triton's interpreter without a GPU, and by PyTorch's, of all positions."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixer = ARSSM(32, 2, max_rank=8, min_rank=2, window=6, memory=1).to(device)
    proj = mixer.in_proj(torch.randn(1, 40, 32, device=device)).detach()
    conv = torch.randn(1, 3, mixer.channels, device=device)
    outcomes = []
    for fused, longest in ((False, 1000.0), (False, 24.0), (True, 24.0)):
        monkeypatch.setattr(context_parallel, "faded", lambda dtype, longest=longest: longest)
        monkeypatch.setattr(context_parallel, "fused_runs", lambda *_, fused=fused: fused)
        mixer.zero_grad()
        given = proj.clone().requires_grad_()
        context = Context([40], 0)
        first = context._first(mixer, given, 40)
        S, k, x, decay = context._left(mixer, given, conv, first)
        left = [S, k[:, :, -5:], x[:, :, -5:]]
        assert (decay == -torch.inf).all() == (longest < 40)
        sum((part * torch.linspace(-1, 1, part.numel(), device=device).view_as(part)).sum() for part in left).backward()
        outcomes.append([*left, given.grad, mixer.dt_bias.grad])
    for other in outcomes[1:]:
        for ours, theirs in zip(other, outcomes[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_would_be_left_out_without_a_word_is_refused():
    model, scaler = model_of(), torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(AssertionError, match="not by Pieces"):
        ContextMicroBatch(Pieces(model, scaler, torch.float32, 8), Context([5, 5], 0))
    attention = MicroBatch(model_of(mixer="attention"), scaler, torch.float32)
    with pytest.raises(ValueError, match="take --mixer ar_ssm"):
        ContextMicroBatch(attention, Context([5, 5], 0))
