"""The pointer's kernels against the definition: compiled on a GPU, in Triton's interpreter without one (tests/conftest.py)."""


import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phase1.ops.pointer import op, pointer_log_probability, pointer_log_probability_reference

pytest.importorskip("triton")

from phase1.ops.pointer import kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, of a whole tensor. Single precision: sums over a window of 2,048 keys. Half precision: its weights of keys and its gradients are rounded once each.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE) if DEVICE == "cuda" else [torch.float32, torch.float16]  # the interpreter has no products in bfloat16
EVERYWHERE = [
    # B, T, past, window, d
    (1, 1, 0, 1, 16),
    (2, 45, 0, 20, 16),
    (1, 70, 33, 30, 32),
    (2, 33, 7, 64, 8),
    (1, 100, 0, 50, 64),
    (1, 65, 1, 10**15, 48),
    (1, 5, 90, 33, 128),
    (2, 1, 40, 8, 16),
    (3, 64, 0, 1, 16),
    # windows that begin and end with a tile
    (4, 100, 0, 34, 16),
    (4, 66, 1, 70, 16),
    (4, 100, 0, 64, 16),
    (4, 97, 0, 65, 16),
]
ON_A_GPU = [
    (2, 1000, 500, 700, 64),
    (3, 2049, 0, 2048, 64),
    (1, 4096, 0, 2048, 128),
    (64, 512, 0, 2048, 64),
    (2, 777, 0, 256, 16),
]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    monkeypatch.setattr(op, "_form", lambda q: kernel)


def operands(B, T, past, d, dtype, V=11):
    """Queries are a part of wider rows, as in the model, and keys are strided too."""
    torch.manual_seed(T + past)
    q = torch.randn(B, T, 3 * d, device=DEVICE).to(dtype)[..., :d].requires_grad_()
    k = torch.randn(past + T, B, d, device=DEVICE).to(dtype).transpose(0, 1).requires_grad_()
    bias = (torch.rand(B, past + T, device=DEVICE) * 0.2).cumsum(1).requires_grad_()
    ids = torch.randint(0, V, (past + T, B), device=DEVICE).T
    targets = torch.randint(-1, V + 5, (B, T), device=DEVICE)
    return q, k, bias, ids, targets.masked_fill(targets < 0, -100)


def outcome(form, q, k, bias, *rest, weight=1.0, **settings):
    y = form(q, k, bias, *rest, **settings)
    torch.manual_seed(5)
    d_y = torch.randn(y.shape, device=DEVICE) * weight
    return y, torch.autograd.grad(y, (q, k, bias), d_y.to(y.dtype))


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, past, window, d", EVERYWHERE + (ON_A_GPU if DEVICE == "cuda" else []))
@pytest.mark.parametrize("weight", [1.0, 1e-5])
def test_result_and_gradients_are_those_of_the_definition_in_float64(dtype, B, T, past, window, d, weight):
    q, k, bias, *rest = operands(B, T, past, d, dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, bias)]
    settings = {"window": window, "past": past}
    wanted, gradients = outcome(pointer_log_probability_reference, *exact, *rest, weight=weight, **settings)
    got, mine = outcome(pointer_log_probability, q, k, bias, *rest, weight=weight, **settings)
    assert got.dtype == torch.float32 and torch.equal(got == -torch.inf, wanted == -torch.inf)
    assert error(got.where(got.isfinite(), 0), wanted.where(wanted.isfinite(), 0)) < TOLERANCE[dtype]
    for name, x, y, like in zip("qkb", mine, gradients, (q, k, bias)):
        assert x.dtype == like.dtype and x.isfinite().all()
        # a small weight is that of a small loss scale: what half precision loses is in the result, 2^-25 at most, not before it
        lost = 2**-24 * y.numel() ** 0.5 if like.dtype == torch.float16 else 0.0
        assert (x.double() - y).norm() < TOLERANCE[dtype] * y.norm() + lost + 1e-6 * weight, name


def test_a_small_loss_scale_costs_no_digits_that_the_result_has():
    """A gradient of 64 equal weights: each weight times that of the loss, 3.1e-6, is no normal number of half precision."""
    q, k, bias, ids, targets = operands(1, 128, 0, 16, torch.float16)
    with torch.no_grad():
        q.fill_(1.0), k.zero_(), bias.zero_(), ids.copy_(torch.arange(128, device=DEVICE)), targets.copy_(ids)
    exact = [x.detach().double().requires_grad_() for x in (q, k, bias)]
    d_y = torch.full((1, 128), 2e-4, device=DEVICE)
    wanted, got = (
        torch.autograd.grad(form(*leaves, ids, targets, window=64), leaves[1], d_y.to(leaves[2].dtype))[0]
        for form, leaves in ((pointer_log_probability_reference, exact), (pointer_log_probability, (q, k, bias)))
    )
    assert error(got, wanted) < 2e-3


def test_where_nothing_matches_there_is_no_probability_and_no_gradient():
    q, k, bias, ids, targets = operands(2, 40, 0, 16, torch.float32)
    got, gradients = outcome(pointer_log_probability, q, k, bias, ids, targets.fill_(50), window=9)
    assert (got == -torch.inf).all() and all((x == 0).all() for x in gradients)


def test_what_is_copied_may_be_far_less_likely_than_what_is_not():
    q, k, bias, ids, targets = operands(1, 40, 0, 16, torch.float32)
    with torch.no_grad():
        ids.fill_(3)[:, 5] = targets.fill_(4)[0, 0]
        bias.zero_()[:, 5] = -300.0
    got = pointer_log_probability(q, k, bias, ids, targets, window=40)
    assert (got[:, 5:] < -250).all() and got[:, 5:].isfinite().all()


def test_a_score_that_is_no_number_makes_its_own_results_nan():
    q, k, bias, ids, targets = operands(1, 70, 0, 16, torch.float32)
    with torch.no_grad():
        q[:, 40] = torch.nan
    got = pointer_log_probability(q, k, bias, ids, targets.fill_(3), window=20)
    assert got[:, 40].isnan().all() and not got[:, :40].isnan().any() and not got[:, 41:].isnan().any()


def test_no_positions_give_no_probabilities():
    q, k, bias, ids, targets = operands(3, 0, 3, 16, torch.float32)
    y, gradients = outcome(pointer_log_probability, q, k, bias, ids, targets, window=4, past=3)
    assert y.shape == (3, 0) and all((x == 0).all() for x in gradients)


def test_repeats_to_the_bit():
    arguments = operands(2, 90, 10, 32, torch.float16)
    first, again = (outcome(pointer_log_probability, *arguments, window=50, past=10) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip((first[0], *first[1]), (again[0], *again[1])))


def test_the_operator_keeps_the_promises_of_custom_operators():
    q, k, bias, ids, targets = operands(2, 20, 4, 16, torch.float32)
    # not its test of autograd by random gradients of the normalizers: they have none
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.pointer, (q, k, bias, ids, targets, 8, 4), test_utils=checks)
    total, copied, d_result = (torch.randn(2, 20, device=DEVICE) for _ in range(3))
    plain = [x.detach() for x in (q, k, bias)]
    torch.library.opcheck(op.pointer_backward, (*plain, ids, targets, total, copied, d_result, 8, 4), test_utils=checks)


@pytest.mark.parametrize("T, window, past", [(7, 3, 0), (7, 30, 0), (7, 30, 9), (7, 9, 5), (7, 5, 5), (1, 1, 0)])
def test_floating_point_operations_are_those_of_the_pairs_that_see_each_other(T, window, past):
    inputs = operands(2, T, past, 16, torch.float32)
    pairs = 2 * sum(min(window, past + t + 1) for t in range(T))
    with FlopCounterMode(display=False) as counter:
        y = pointer_log_probability(*inputs, window=window, past=past)
        assert counter.get_total_flops() == 2 * 16 * pairs
        y.nan_to_num(neginf=0).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 16 * pairs
