"""A compiler that is wrong is found before anything is trained with it."""

from contextlib import nullcontext

import pytest
import torch

from phase1.cli import main
from phase1.config import EngineShape, TrainConfig
from phase1.errors import Unavailable
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.training import job, proof
from phase1.training.compiler import compile_losses
from phase1.training.proof import errors, prove_compiled
from phase1.training.step import make_train_state

TINY = EngineShape(
    vocab_size=200, d_model=32, n_layers=1, n_heads=2, ar_ssm_window=8, htt_dense_rows=8, htt_groups=10, copy_window=16
)


def state_compiled_by(backend, piece_length=None, **overrides):
    torch.manual_seed(0)
    config = TrainConfig(micro_batch_size=2, piece_length=piece_length)
    state = make_train_state(LanguageModel(model_config("phase1", TINY, recompute="none", **overrides)), config, "cpu")
    torch._dynamo.reset()
    compile_losses(state.model, piece_length is not None, backend=backend)
    return state


def batch():
    ids = torch.randint(200, (4, 25), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def larger(graph, inputs):
    """A backend whose results, and so their gradients, are a fifth too large."""

    def run(*arguments):
        return tuple(x * 1.2 if isinstance(x, torch.Tensor) and x.requires_grad else x for x in graph(*arguments))

    return run


@pytest.mark.parametrize("piece_length", [None, 8])
def test_a_compiler_that_is_right_passes_and_leaves_nothing(piece_length):
    state = state_compiled_by("aot_eager", piece_length)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    prove_compiled(state, batch())
    assert all(p.grad is None for p in state.model.parameters()) and state.step == 0 and not state.optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())


@pytest.mark.parametrize("piece_length", [None, 8])
def test_a_compiler_that_is_wrong_is_refused_in_one_line(piece_length):
    with pytest.raises(Unavailable, match=r"--compile must give .* differs by \d+%; leave --compile out") as raised:
        prove_compiled(state_compiled_by(larger, piece_length), batch())
    assert "\n" not in str(raised.value)


def test_one_wrong_gradient_among_many_is_found_and_noise_of_small_ones_is_not():
    wanted = {"a": torch.full((100,), 10.0), "b": torch.full((10,), 0.1), "c": torch.full((2,), 1e-6)}
    noise = {"a": 1.001 * wanted["a"], "b": 0.99 * wanted["b"], "c": -wanted["c"]}
    found = errors(noise, wanted)
    assert max(found, key=found.get) == "b" and found["b"] == pytest.approx(0.01, rel=1e-3)
    assert errors(noise | {"b": wanted["b"].roll(1) * 0}, wanted)["b"] == pytest.approx(1.0)
    assert errors(noise | {"b": wanted["b"] / 0 * 0}, wanted)["b"] == float("inf")


@pytest.mark.parametrize("off, is_wrong", [(0.45, False), (0.7, True)])
@pytest.mark.parametrize("furthest", ["gate", "other"])
def test_where_gradients_are_mostly_rounding_the_written_ones_say_how_far_one_may_be_from_float32s(
    monkeypatch, off, is_wrong, furthest
):
    """A written gradient is 0.3 off; a compiled one to the other side, so that the two differ by more than the limit."""
    asked = []

    def gradients(state, micro_batch, dtype):
        asked.append(dtype)
        if dtype == torch.float32:
            return {"gate": torch.ones(4), "other": torch.ones(4)}
        if len(asked) == 1:
            return {"gate": torch.full((4,), 1 + off), "other": torch.ones(4)}
        return {"gate": torch.ones(4), "other": torch.ones(4)} | {furthest: torch.full((4,), 0.7)}

    monkeypatch.setattr(proof, "_gradients", gradients)
    state = state_compiled_by("aot_eager")
    state.dtype = torch.float16
    with pytest.raises(Unavailable, match="that of gate differs by 70%") if is_wrong else nullcontext():
        prove_compiled(state, batch())
    assert asked == [torch.float16, torch.float16, torch.float32]


def test_without_memory_for_float32_a_gradient_that_differs_is_wrong(monkeypatch):
    asked = []

    def gradients(state, micro_batch, dtype):
        asked.append(dtype)
        if dtype == torch.float32:
            raise torch.cuda.OutOfMemoryError("no")
        return {"gate": torch.full((4,), float(len(asked)))}

    monkeypatch.setattr(proof, "_gradients", gradients)
    state = state_compiled_by("aot_eager")
    state.dtype = torch.float16
    with pytest.raises(Unavailable, match="that of gate differs by 50%"):
        prove_compiled(state, batch())
    assert asked[-1] == torch.float32


def test_what_needs_too_much_memory_as_written_stays_unproven(monkeypatch):
    state = state_compiled_by("aot_eager")

    def forward(*_):
        raise torch.cuda.OutOfMemoryError("no")

    monkeypatch.setattr("phase1.training.proof._gradients", forward)
    with pytest.warns(UserWarning, match="not proven: as it is written it needs more memory"):
        prove_compiled(state, batch())


def test_no_parameter_hides_behind_one_that_begins_at_zero(monkeypatch):
    seen = []
    state = state_compiled_by("aot_eager", htt_output="two_level")
    monkeypatch.setattr(proof, "errors", lambda found, wanted: seen.append(wanted) or {})
    prove_compiled(state, batch())
    assert all(gradient.any() for name, gradient in seen[0].items() if not name.endswith("bias"))


def test_a_training_that_compiles_begins_with_the_proof(monkeypatch, tmp_path, capsys):
    def prove(state, first):
        raise Unavailable(f"asked of step {state.step} with {tuple(first[0].shape)}")

    monkeypatch.setattr(job, "prove_compiled", prove)
    monkeypatch.setattr("phase1.training.step.require_compiler", lambda device: None)
    (tmp_path / "text.txt").write_text("some words and some more words to learn from\n" * 400)
    shape = "--vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2 --htt-dense-rows 8 --htt-groups 8 --ar-ssm-max-rank 4 --htt-rank 2"
    size = "--seq-length 24 --train-tokens 480 --train-batch-size 4 --micro-batch-size 2 --eval-every 0"
    where = f"--dataset-name {tmp_path}/text.txt --out-dir {tmp_path}/out"
    assert main(["train", *shape.split(), *size.split(), *where.split(), "--compile"]) == 3
    assert "asked of step 0 with (2, 24)" in capsys.readouterr().err
