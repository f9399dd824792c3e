from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phase1.config import EngineShape, TrainConfig
from phase1.errors import Diverged, Unavailable
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.training import checkpoint
from phase1.training.checkpoint import check_configs, load_model, read_index, resume, save_checkpoint
from phase1.training.micro_batch import add_gradients
from phase1.training.step import check_finite, learning_rate, make_train_state, total_steps, train, train_step

TINY = EngineShape(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=1, htt_dense_rows=2, htt_groups=6,
)  # fmt: skip
CONFIG = TrainConfig(train_tokens=40 * 4 * 8, train_batch_size=4, micro_batch_size=2, warmup_steps=3)
STEPS = total_steps(CONFIG, 8)


def state(config=CONFIG, role="phase1", device="cpu", **overrides):
    torch.manual_seed(config.seed)
    return make_train_state(LanguageModel(model_config(role, TINY, **overrides)), config, device)


def batch_at(step, size=4):
    ids = np.random.default_rng(step).integers(0, 50, (size, 9))
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())


def as_tensors(batch, size):
    return list(zip(*(part.split(size) for part in batch)))


def parameters(state):
    return [p.detach().clone() for p in state.model.parameters()]


def train_until(state, stop):
    """The whole schedule, broken off after `stop` steps."""

    def interrupt(step, loss):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(state, batch_at, total_steps(state.config, 8), interrupt)


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_a_step_learns_and_frees_its_gradients(role):
    s = state(role=role)
    before = parameters(s)
    losses = [train_step(s, as_tensors(batch_at(0), 4)).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in s.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, s.model.parameters()))


def test_the_split_into_micro_batches_does_not_change_the_step():
    outcomes = []
    for size in (1, 3, 4):
        s = state()
        s.model.double()
        train_step(s, as_tensors(batch_at(0), size))
        outcomes.append(parameters(s))
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_phases_are_marked_in_order():
    marks = []
    train_step(state(), as_tensors(batch_at(0), 2), marks.append)
    assert marks == ["start", "forward", "backward", "forward", "backward", "optimizer"]


@pytest.mark.parametrize("cut", [1, 7, 39])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, cut):
    whole = state()
    train(whole, batch_at, STEPS)
    first = state()
    train_until(first, cut)
    save_checkpoint(tmp_path, first, {"data": "x"})
    second = state(config=CONFIG)
    for p in second.model.parameters():
        torch.nn.init.normal_(p)  # all must come from the checkpoint
    assert resume(tmp_path, second) == {"data": "x"}
    train(second, batch_at, STEPS)
    assert_equal(parameters(whole), parameters(second))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-2}, {"table_learning_rate": 1.0}, {"warmup_steps": 1}, {"weight_decay": 5.0}, {"grad_clip": 1e-8}, {"seed": 1}, {"precision": "bf16"},
        {"train_tokens": 7 * 32}, {"optimizer": "adamw"}, {"schedule": "cosine"},
    ],
    ids=str,
)  # fmt: skip
def test_every_training_setting_changes_the_result(change):
    outcomes = []
    for config in (CONFIG, replace(CONFIG, **change)):
        s = state(config)
        train_until(s, 6)
        outcomes.append(parameters(s)[-3])
    assert not torch.equal(*outcomes)


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    cosine = replace(CONFIG, warmup_steps=100, schedule="cosine", learning_rate=3e-3)
    rates = [learning_rate(cosine, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-5, rel=1e-3) and max(rates) > 0.95 * 3e-3
    assert rates[-1] == pytest.approx(3e-4, rel=1e-3) and rates[100:] == sorted(rates[100:], reverse=True)


def test_a_diverged_run_ends_with_one_line():
    s = state()
    with torch.no_grad():
        s.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Diverged, match="lower --learning-rate"):
        train(s, batch_at, STEPS)


def test_a_run_that_diverges_at_its_beginning_ends_there():
    s, seen = state(), []

    def spoil(step, loss):
        seen.append(step)
        if step == 2:
            with torch.no_grad():
                s.model.norm.weight.fill_(torch.nan)

    with pytest.raises(Diverged, match="at step 5"):
        train(s, batch_at, STEPS, spoil)
    assert seen[-1] == 4


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_run_that_diverged_is_told_of_bf16_where_the_card_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    loss = SimpleNamespace(item=lambda: float("nan"), device=torch.device("cuda"))
    with pytest.raises(Diverged) as said:
        check_finite(loss, 7)
    assert str(said.value).endswith("lower --learning-rate" + " or use --precision bf16" * has_bf16)


def test_resuming_with_other_settings_names_the_flags(tmp_path):
    s = state()
    save_checkpoint(tmp_path, s, {})
    with pytest.raises(ValueError, match=r"--learning-rate \(\S+, not 0.0001\); use those"):
        resume(tmp_path, state(replace(CONFIG, learning_rate=1e-4)))
    with pytest.raises(ValueError, match="--ar-ssm-window"):
        resume(tmp_path, state(ar_ssm_window=3))


def test_a_training_goes_on_with_less_memory_as_the_model_that_it_was(tmp_path):
    """How activations and the loss are computed may change at every resume; the checkpoint keeps what it began with."""
    whole, first = state(), state()
    train_until(whole, 20)
    train_until(first, 10)
    save_checkpoint(tmp_path, first, {})
    begun = read_index(tmp_path)["model_config"]
    for stop, how in ((15, {"recompute": "none", "loss": "materialized"}), (20, {"recompute": "selective"})):
        again = state(**how)
        resume(tmp_path, again)
        train_until(again, stop)
        save_checkpoint(tmp_path, again, {})
        assert read_index(tmp_path)["model_config"] == begun != asdict(again.model.config)
    for a, b in zip(parameters(again), parameters(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model, train", [({}, {"compile": True}), ({}, {"cuda_graphs": True}), ({"attention": "math"}, {})], ids=str)
def test_what_computes_a_model_may_change_where_it_goes_on(model, train, tmp_path):
    before = state(role="baseline")
    save_checkpoint(tmp_path, before, {})
    now = replace(before.model.config, **model), replace(before.config, **train)
    check_configs(tmp_path, read_index(tmp_path), *now)
    with pytest.raises(ValueError, match="--seed"):
        check_configs(tmp_path, read_index(tmp_path), now[0], replace(now[1], seed=before.config.seed + 1))


@pytest.mark.parametrize("saves", [1, 99])
def test_who_reads_while_a_training_saves_gets_the_newer_checkpoint(tmp_path, monkeypatch, saves):
    """The files of the index that was read are gone by then. Nothing says to train again, however often that happens."""
    s, left = state(), [saves]
    save_checkpoint(tmp_path, s, {"trained_tokens": 0})

    def open_late(path):
        if left:
            more = left.pop() - 1
            s.step += 1
            s.model.blocks[0].mlp_norm.weight.data += 1
            save_checkpoint(tmp_path, s, {"trained_tokens": s.step})  # which opens files too
            left.extend([more] * (more > 0))
        return open_tensors(path)

    open_tensors = checkpoint.open_tensors
    monkeypatch.setattr(checkpoint, "open_tensors", open_late)
    if saves > 1:
        with pytest.raises(ValueError, match=r"must stay while it is read; got a training that saves .*; read it again, or when"):
            load_model(tmp_path)
        return
    model, facts = load_model(tmp_path)
    assert facts == {"trained_tokens": 1} and torch.equal(model.blocks[0].mlp_norm.weight, s.model.blocks[0].mlp_norm.weight)
    with pytest.raises(ValueError, match=f"does not fit this version: .*model-{1:08}.*; train again"):  # lost, and no save
        monkeypatch.setattr(checkpoint, "open_tensors", lambda path: (path.unlink(missing_ok=True), open_tensors(path))[1])
        load_model(tmp_path)


def test_a_checkpoint_for_evaluation_restores_the_model_with_its_token_order(tmp_path):
    s = state()
    s.model.embedding.row_of_id.copy_(torch.randperm(50))
    train(s, batch_at, 2)
    save_checkpoint(tmp_path, s, {"trained_tokens": 64}, resumable=False)
    model, facts = load_model(tmp_path)
    ids = batch_at(5)[0]
    assert torch.equal(model(ids), s.model(ids)) and facts == {"trained_tokens": 64}
    with pytest.raises(ValueError, match="not resumed"):
        resume(tmp_path, state())


def test_a_crash_while_saving_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch):
    import phase1.training.checkpoint

    s = state()
    save_checkpoint(tmp_path, s, {})
    expected = parameters(s)
    train(s, batch_at, 2)
    write = phase1.training.checkpoint.atomic_write
    for fail_at in range(3):
        calls = iter(range(9))

        def crash(path, data, fail_at=fail_at, calls=calls):
            if next(calls) == fail_at:
                raise OSError("disk full")
            write(path, data)

        monkeypatch.setattr(phase1.training.checkpoint, "atomic_write", crash)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, s, {})
        assert_equal(expected, load_model(tmp_path)[0].parameters())


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_model(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="not a checkpoint of format 1"):
        load_model(tmp_path)


def test_cuda_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="--cuda-graphs needs a GPU"):
        state(replace(CONFIG, cuda_graphs=True))


def test_compilation_without_a_compiler_is_one_line_before_training(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nin 100 lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(Unavailable, match="--compile needs a C.. compiler that works here; got RuntimeError: No working") as error:
        state(replace(CONFIG, compile=True))
    assert "\n" not in str(error.value)


def test_a_training_that_ran_out_of_memory_goes_on_with_smaller_micro_batches(tmp_path):
    """They change the result by rounding alone, so a checkpoint of other ones is the same training."""
    first = state()
    train_until(first, 7)
    save_checkpoint(tmp_path, first, {"data": "x"})
    second = state(replace(CONFIG, micro_batch_size=1))
    resume(tmp_path, second)
    train(second, batch_at, STEPS)
    train(first, batch_at, STEPS)
    for a, b in zip(parameters(first), parameters(second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_gradients_that_are_added_at_once_are_those_of_backward(role):
    model = state(role=role).model
    ids, targets = batch_at(0)
    model.loss(ids, targets).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [p.grad for p in model.parameters()]
    for times in (2, 3):  # they are added to the same tensors
        add_gradients(model.loss(ids, targets), model)
        for parameter, once, buffer in zip(model.parameters(), expected, buffers, strict=True):
            assert parameter.grad is buffer
            if once is not None:
                torch.testing.assert_close(parameter.grad, times * once)
