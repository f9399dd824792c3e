"""Groups by meaning, Muon as torch's own, schedules, and steps that do not depend on their split."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from phase1.config import EngineShape, TrainConfig
from phase1.model import LanguageModel
from phase1.roster import RIVALS, model_config
from phase1.training.checkpoint import resume, save_checkpoint
from phase1.training.muon import Muon, orthogonalise
from phase1.training.optimizers import MuonAdamW, kept, make_optimizer, parameter_groups
from phase1.training.step import learning_rate, make_train_state, skipped_steps, total_steps, train, train_step

TINY = EngineShape(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=1, htt_dense_rows=2, htt_groups=6, copy_window=8,
)  # fmt: skip
MUON = TrainConfig(train_tokens=12 * 4 * 8, train_batch_size=4, micro_batch_size=2, warmup_steps=3, optimizer="muon")
STEPS = total_steps(MUON, 8)
MODELS = {"phase1": {}, "baseline": {}, "fair": RIVALS["transformer_fair_copy"]}


def model(name="phase1", **overrides):
    torch.manual_seed(0)
    role = "phase1" if name == "phase1" else "baseline"
    return LanguageModel(model_config(role, TINY, **(MODELS[name] | overrides)))


def state(config=MUON, name="phase1", **overrides):
    return make_train_state(model(name, **overrides), config, "cpu")


def batch_at(step, size=4):
    ids = torch.randint(0, 50, (size, 9), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def split(batch, *sizes):
    return list(zip(*(part.split(list(sizes)) for part in batch)))


def parameters(s):
    return [p.detach().clone() for p in s.model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_are_the_matrices_of_linear_layers_and_nothing_else(name):
    net = model(name)
    groups = parameter_groups(net, TrainConfig())
    names = {id(p): n for n, p in net.named_parameters()}
    decaying, table, rest = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0] and [group["lr_scale"] for group in groups] == [1, 3, 1]
    assert decaying == {f"{n}.weight" for n, module in net.named_modules() if isinstance(module, nn.Linear)}
    assert table == {n for n in names.values() if n.startswith("embedding.") and n != "embedding.output_bias"}
    assert len(decaying) + len(table) + len(rest) == len(names)
    for last in ("q_scale", "state_scale", "conv_weight", "conv_bias", "norm", "D", "A_log", "dt_bias", "gate"):
        assert not any(n.endswith(f".{last}") for n in decaying | table)


def test_the_scales_and_taps_keep_their_size_where_decay_alone_acts():
    s = state(replace(MUON, optimizer="adamw", weight_decay=10.0, learning_rate=0.01))
    before = {n: p.detach().clone() for n, p in s.model.named_parameters()}
    for p in s.model.parameters():
        p.grad = torch.zeros_like(p)
    s.optimizer.step()
    changed = {n for n, p in s.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{n}.weight" for n, module in s.model.named_modules() if isinstance(module, nn.Linear)}


def test_muon_takes_the_matrices_of_blocks_and_steps_them_as_torchs_own():
    net, config = model("fair"), replace(MUON, learning_rate=0.02, weight_decay=0.3)
    optimizer = make_optimizer(net, config, "cpu")
    matrices = {n: p for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2 and "conv" not in n and "scale" not in n}
    tensors = kept(optimizer)
    assert {n for n, p in net.named_parameters() if tensors[p] == ("momentum_buffer",)} == set(matrices)
    assert tensors[net.copy_head.qk_proj.weight] == tensors[net.embedding.rows] == ("step", "exp_avg", "exp_avg_sq")
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in net.named_parameters()}
    muon = torch.optim.Muon([copies[n] for n in matrices], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    qk_proj = torch.optim.AdamW([copies["copy_head.qk_proj.weight"]], lr=0.02, weight_decay=0.3, betas=(0.9, 0.95))
    for step in range(3):
        torch.manual_seed(step)
        for n, p in net.named_parameters():
            p.grad = torch.randn_like(p)
            copies[n].grad = p.grad.clone()
        optimizer.step(), muon.step(), qk_proj.step()
    assert torch.equal(net.copy_head.qk_proj.weight, copies["copy_head.qk_proj.weight"])
    for n in matrices:  # torch's own takes matrices one by one: sums in bfloat16 differ in their order
        torch.testing.assert_close(net.get_parameter(n), copies[n], rtol=0, atol=2e-3)


def test_one_step_of_muon_is_its_formula():
    """Nesterov momentum, five Newton-Schulz steps, 0.2 sqrt(max(n, m)), decay: Jordan 2024, and Liu et al. 2025, eq. 4."""
    net, config = model("baseline"), replace(MUON, learning_rate=0.02, weight_decay=0.3)
    optimizer, weight = make_optimizer(net, config, "cpu"), net.blocks[0].mlp.gate_up_proj.weight
    before, gradient = weight.detach().clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient
    optimizer.step()
    x = gradient + 0.95 * (0.05 * gradient - gradient)  # m = 0.05 g, then g + 0.95 (m - g)
    x = x.T / x.norm()  # n > m
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = before * (1 - 0.02 * 0.3) - 0.02 * 0.2 * max(weight.shape) ** 0.5 * x.T
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=5e-4)  # torch's steps are in bfloat16
    assert (weight - before).abs().max() > 5e-3


def test_a_step_of_muon_whose_gradients_overflow_changes_nothing_though_the_host_does_not_know():
    weights = [nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    optimizer = Muon(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones(4, 6)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = [(w.detach().clone(), optimizer.state[w]["momentum_buffer"].clone()) for w in weights]
    weights[1].grad[0, 0], optimizer.found_inf = torch.nan, torch.ones(())
    optimizer.step()
    for weight, (value, momentum) in zip(weights, before, strict=True):
        assert torch.equal(weight, value) and torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(weights[0], before[0][0]) and weights[1].isnan().all()


def test_rates_of_the_schedule_reach_both_parts():
    s = state()
    rates = []
    train(s, batch_at, STEPS, lambda step, loss: rates.append([group["lr"] for part in s.optimizer.parts for group in part.param_groups]))
    for step, found in enumerate(rates):
        rate = learning_rate(MUON, step, STEPS)
        assert found == [rate, rate, 3 * rate, rate]


@pytest.mark.parametrize("schedule, last", [("cosine", 0.1), ("linear", 0.0)])
@pytest.mark.parametrize("warmup, steps", [(100, 1372), (100, 300), (1, 50), (0, 50), (3, 1)])
def test_the_rate_rises_to_the_flag_and_falls_to_the_end(schedule, last, warmup, steps):
    config = TrainConfig(schedule=schedule, warmup_steps=warmup, learning_rate=0.7)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == 0.7 and top == max(1, min(warmup, steps // 10)) - 1
    assert rates[: top + 1] == pytest.approx([0.7 * (i + 1) / (top + 1) for i in range(top + 1)])
    assert rates[top:] == sorted(rates[top:], reverse=True) and min(rates[top:]) > 0.7 * last
    assert learning_rate(config, steps, steps) == pytest.approx(0.7 * last, abs=1e-12)  # the step that is not taken
    if schedule == "linear" and steps > 1:
        falls = [a - b for a, b in zip(rates[top:], rates[top + 1 :])]
        assert falls == pytest.approx([falls[0]] * len(falls))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [1, 7, 11])
def test_a_run_with_muon_resumes_as_if_it_had_not_stopped(tmp_path, cut, name):
    whole, first, second = state(name=name), state(name=name), state(name=name)
    train(whole, batch_at, STEPS)

    def interrupt(step, loss):
        if step == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(first, batch_at, STEPS, interrupt)
    save_checkpoint(tmp_path, first, {})
    resume(tmp_path, second)
    train(second, batch_at, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_overflows_is_skipped_whole_and_counted(optimizer):
    s = state(replace(MUON, optimizer=optimizer, precision="fp16"))
    train_step(s, split(batch_at(0), 4))
    s.scaler._scale.fill_(1.0)
    train_step(s, split(batch_at(1), 4))
    before, counted = parameters(s), skipped_steps(s)
    s.scaler._scale.fill_(2.0**60)
    train_step(s, split(batch_at(2), 4))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(s), strict=True))
    assert skipped_steps(s) == counted + 1 and s.step == 3 and s.scaler.get_scale() < 2.0**60


def test_the_word_on_an_overflow_stays_on_the_device_where_adamw_is_fused(monkeypatch):
    """As on a GPU; the steps are those of a scaler that waits for the word."""
    outcomes = []
    for fused in (False, True):
        s = state(replace(MUON, precision="fp16"))
        s.optimizer = make_optimizer(s.model, MUON, "cuda" if fused else "cpu")
        s.optimizer.parts[0].dtype = None
        if fused:
            monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", None)
        for step, scale in enumerate((1.0, 2.0**60, 1.0)):
            s.scaler.scale(torch.ones(()))
            s.scaler._scale.fill_(scale)
            train_step(s, split(batch_at(step), 4))
        outcomes.append(parameters(s))
        assert s.optimizer.state[s.model.embedding.rows]["step"] == 2
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_loaded_is_what_both_parts_go_on_with():
    outcomes = []
    for reload in (False, True):
        s = state()
        train_step(s, split(batch_at(0), 4))
        if reload:
            kept_so_far, s.optimizer = s.optimizer.state_dict(), make_optimizer(s.model, MUON, "cpu")
            s.optimizer.load_state_dict(kept_so_far)
        train_step(s, split(batch_at(1), 4))
        outcomes.append(parameters(s))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_all_gradients_are_zeroed_at_once_where_adamw_is_fused(monkeypatch):
    net, zeroed, at_once = model(), [], torch._foreach_zero_
    optimizer = make_optimizer(net, MUON, "cuda")
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(torch, "_foreach_zero_", lambda tensors: zeroed.append(len(tensors)) or at_once(tensors))
    optimizer.zero_grad(set_to_none=False)
    assert zeroed == [len(list(net.parameters()))] and not any(p.grad.any() for p in net.parameters())


def test_only_one_part_that_overflows_stops_the_other():
    s = state(replace(MUON, precision="fp16"))
    before = parameters(s)
    for p in s.model.parameters():
        p.grad = torch.ones_like(p)
    s.model.blocks[0].mlp.down_proj.weight.grad[0, 0] = torch.inf
    s.scaler.scale(torch.ones(()))
    s.scaler.unscale_(s.optimizer)
    s.scaler.step(s.optimizer)
    s.scaler.update()
    assert isinstance(s.optimizer, MuonAdamW)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(s), strict=True))


@pytest.mark.parametrize("loss", ["chunked", "materialized"])
@pytest.mark.parametrize("name", ["phase1", "fair"])
@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 2), (3, 1)], ids=str)
def test_no_split_changes_a_step_where_some_targets_are_not_scored(loss, name, sizes):
    inputs, targets = batch_at(0)
    targets[0], targets[1, 2:], targets[3, 1] = -100, -100, -100  # the first window: nothing at all
    outcomes = []
    for cut in ((4,), sizes):
        s = state(replace(MUON, optimizer="adamw"), name, loss=loss, rank_penalty=0.5)
        s.model.double()
        outcomes.append([train_step(s, split((inputs, targets), *cut)), *parameters(s)])
    for a, b in zip(*outcomes, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # shares are float32; a step is 1e-3


@pytest.mark.parametrize("loss", ["chunked", "materialized"])
@pytest.mark.parametrize("name", MODELS)
def test_a_micro_batch_without_a_scored_target_has_no_number_and_no_gradient(loss, name):
    net, (ids, targets) = model(name, loss=loss, rank_penalty=0.0), batch_at(0)
    value = net.loss(ids, torch.full_like(targets, -100))
    value.backward()
    assert value.isnan() and all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_the_loss_that_training_shows_is_the_cross_entropy_without_the_penalty():
    s = state(rank_penalty=100.0)
    ids, targets = batch_at(0)
    expected = s.model.eval().loss(ids, targets)
    torch.testing.assert_close(train_step(s, [(ids, targets)]), expected.detach())


SHAPES = [(3, 8, 24), (2, 24, 8), (1, 5, 5), (2, 8, 8), (1, 8, 40)]


@pytest.mark.parametrize("shapes", [*([shape] for shape in SHAPES), SHAPES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_orthogonal_matrices_have_the_directions_of_the_given_ones_and_singular_values_of_about_1(shapes, dtype):
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    units = [matrices / matrices.norm(dim=(1, 2), keepdim=True) for matrices in given]
    orthogonalise(results := [unit.to(dtype) for unit in units])
    for matrices, found in zip(units, results, strict=True):
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        found = left.mT @ found.float() @ right.mT
        assert found.diagonal(dim1=-2, dim2=-1).sub(1).abs().max() < 0.5
        assert (found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.05
    orthogonalise(nothing := [torch.zeros(shape) for shape in shapes])
    assert not any(matrices.any() for matrices in nothing)


@pytest.mark.parametrize("decades", [0, 1, 2, 4])
def test_half_precision_takes_the_steps_of_double_precision_for_any_spectrum(decades):
    """Closer than bfloat16 comes without the smaller matrices: 1, 3 and 7 % of the length for 1, 2 and 4 decades."""
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(size, 96, generator=generator).double())[0] for size in (96, 300))
    x = left * 10 ** torch.linspace(0, -decades, 96).double() @ right.mT
    x /= x.norm()
    orthogonalise(half := [x[None].half()])
    orthogonalise(double := [x[None]])
    wanted = x
    for _ in range(5):
        A = wanted @ wanted.mT
        wanted = 3.4445 * wanted + (-4.7750 * A + 2.0315 * A @ A) @ wanted
    assert (half[0][0].double() - wanted).norm() < 0.015 * wanted.norm()
    torch.testing.assert_close(double[0][0], wanted, rtol=1e-9, atol=1e-9)
