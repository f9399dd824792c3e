"""What only a GPU can show: half precision, its kernels, and compiled blocks, against float64 on the CPU."""

import pytest
import torch

from phase1.config import ROLES, Ranked, TrainConfig, model_config
from phase1.model import LanguageModel
from phase1.train import make_train_state, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = Ranked(vocab_size=3001, d_model=128, n_layers=2, n_heads=2, htt_dense_rows=60, htt_groups=100)
# Relative RMS of all gradients together, in units of the rounding error eps of the type. The CPU's own half precision differs from
# float64 by 17 to 51 eps here: some 20 products in a row, and a normalised output whose size can be near 0.
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TOLERANCE_EPS = {torch.float32: 2000, torch.float16: 100, torch.bfloat16: 100}  # float32: a GPU's exp and rsqrt are rougher


def pair(role, rank=32, T=200):
    torch.manual_seed(0)
    model = LanguageModel(model_config(role, SMALL, ar_ssm_max_rank=rank))
    ids = torch.randint(0, 3001, (2, T + 1))
    return model, ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_loss_and_gradients_on_the_gpu_are_those_of_float64(role, dtype, rank):
    model, ids, targets = pair(role, rank)
    expected = model.double().loss(ids, targets)
    wanted = dict(zip(dict(model.named_parameters()), torch.autograd.grad(expected, list(model.parameters()))))
    model = model.float().cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = model.loss(ids.cuda(), targets.cuda())
    (loss * 1024).backward()
    assert abs(loss.item() - expected.item()) < 100 * EPS[dtype] * expected.item()
    total = sum(gradient.square().sum() for gradient in wanted.values()) ** 0.5
    errors = {name: (p.grad.double().cpu() / 1024 - wanted[name]).norm() for name, p in model.named_parameters()}
    assert sum(error**2 for error in errors.values()) ** 0.5 < TOLERANCE_EPS[dtype] * EPS[dtype] * total
    if dtype == torch.float32:  # no rounding to hide behind: every single parameter
        for name, error in errors.items():
            assert error < 5e-3 * wanted[name].norm().clamp(min=1e-4), name


@pytest.mark.parametrize("role", ROLES)
def test_a_changed_token_changes_no_earlier_logit_by_one_bit(role):
    model, ids, _ = pair(role)
    model, ids = model.cuda(), ids.cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        before = model(ids)
        ids[:, 150] = (ids[:, 150] + 1) % 3001
        after = model(ids)
    assert torch.equal(after[:, :150], before[:, :150]) and not torch.equal(after[:, 150:], before[:, 150:])


@pytest.mark.parametrize("role", ["baseline", "phase1"])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_training_learns(role, compiled):
    model, ids, targets = pair(role, T=256)
    first = model.loss(ids, targets).item()
    state = make_train_state(model, TrainConfig(compile=compiled), "cuda")
    losses = [train_step(state, [(ids, targets)]).item() for _ in range(30)]
    assert losses[0] == pytest.approx(first, rel=1e-2) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("role", ["baseline", "phase1"])
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_steps_are_the_steps_of_eager_training(role, compiled):
    """Two micro batches a step, and a change of length: each its own capture."""
    trained, losses = [], []
    for graphs in (False, True):
        model, ids, targets = pair(role, T=256)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        # a small rate: at the usual one, without its warm-up, rounding errors grow with every step
        state = make_train_state(model, TrainConfig(compile=compiled, cuda_graphs=graphs, learning_rate=3e-4), "cuda")
        # few tokens have large gradients: at the first scale it is up to rounding which steps overflow and are skipped
        state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 1024.0})
        batches = [[(ids[:1], targets[:1]), (ids[1:], targets[1:])]] * 4 + [[(ids[:, :64], targets[:, :64])]] * 4
        losses.append([train_step(state, batch).item() for batch in batches])
        trained.append(state.model.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for name, value in trained[0].items():
        # Adam's first steps are as long for a gradient of rounding errors as for a real one: not one by one, but together
        moved = (value.cpu() - start[name]).float().norm()
        assert (trained[1][name] - value).float().norm() <= 0.05 * moved, name


def test_a_replayed_overflow_skips_the_step_and_lowers_the_loss_scale():
    model, ids, targets = pair("phase1", T=64)
    state = make_train_state(model, TrainConfig(cuda_graphs=True), "cuda")
    train_step(state, [(ids, targets)])
    state.scaler.update(2.0**40)
    before, scale = {k: v.clone() for k, v in model.state_dict().items()}, state.scaler.get_scale()
    train_step(state, [(ids, targets)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and state.scaler.get_scale() < scale
