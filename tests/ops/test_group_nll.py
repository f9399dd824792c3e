"""The loss inside groups: PyTorch's form and the kernels (in Triton's interpreter without a GPU) against the definition."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phase1.ops.group_nll import gathered, group_nll, group_nll_reference, op

pytest.importorskip("triton")

from phase1.ops.group_nll import kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no products in bfloat16
CASES = [(form, dtype) for form in (kernel, gathered) for dtype in [torch.float32, *HALF]] + [(gathered, torch.float64)]
SIZES = [
    # N, n, size, D
    (40, 55, 11, 32),
    (70, 100, 19, 130),
    (33, 67 * 3 + 38, 67, 64),
    (5, 3, 7, 16),
    (60, 40, 1, 16),
]


def operands(N, n, D, dtype):
    """Three in four tokens are in a group; the states are rows of a wider tensor."""
    torch.manual_seed(N)
    wide = torch.promote_types(dtype, torch.float32)
    states = torch.randn(N, 2 * D, device=DEVICE).to(dtype)[:, :D].requires_grad_()
    rows = (torch.randn(n, D, device=DEVICE) * D**-0.5).to(dtype).requires_grad_()
    bias = torch.randn(n, device=DEVICE).to(wide).requires_grad_()
    targets = torch.randint(0, n, (N,), device=DEVICE)
    targets[:: max(1, N // 3)] = n - 1
    targets[::4] = -1 - targets[::4]
    return states, rows, bias, targets


def outcome(form, states, rows, bias, targets, size, weight=1.0):
    nll = form(states, rows, bias, targets, size)
    torch.manual_seed(3)
    d_nll = (torch.rand(nll.shape, device=DEVICE) * weight).to(nll.dtype)
    return nll, *torch.autograd.grad(nll, (states, rows, bias), d_nll)


@pytest.mark.parametrize("form, dtype", CASES, ids=str)
@pytest.mark.parametrize("N, n, size, D", SIZES)
@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_losses_and_gradients_are_those_of_the_definition_in_float64(form, dtype, N, n, size, D, weight, monkeypatch):
    monkeypatch.setattr(op, "_form", lambda states, size: form)
    monkeypatch.setattr(gathered, "CHUNK_BYTES", 7 * size * D * 2)
    *leaves, targets = operands(N, n, D, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = outcome(group_nll_reference, *exact, targets, size, weight)
    for got, wanted, like in zip(
        outcome(group_nll, *leaves, targets, size, weight), expected, (leaves[2], *leaves), strict=True
    ):
        assert got.dtype == like.dtype and got.isfinite().all()
        lost = 2**-24 * got.numel() ** 0.5 if got.dtype == torch.float16 else 0.0
        assert (got.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm() + lost + 1e-6 * weight * (size == 1)


@pytest.mark.parametrize("form", [group_nll, group_nll_reference])
def test_the_definition_written_out(form):
    states, rows, bias, targets = operands(20, 17, 8, torch.float64)
    nll = form(states, rows, bias, targets, 5)
    for h, t, got in zip(states, targets.tolist(), nll):
        group = [j for j in range(17) if j // 5 == t // 5]
        expected = -torch.stack([h @ rows[j] + bias[j] for j in group]).log_softmax(0)[group.index(t)] if t >= 0 else 0.0
        torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype, device=DEVICE))


@pytest.mark.parametrize("form", [kernel, gathered])
@pytest.mark.parametrize("case", ["none", "all of one group", "no tokens"])
def test_groups_without_tokens_and_groups_with_all(form, case, monkeypatch):
    monkeypatch.setattr(op, "_form", lambda states, size: form)
    states, rows, bias, targets = operands(0 if case == "no tokens" else 50, 33, 16, torch.float32)
    targets.fill_(12 if case == "all of one group" else -100)
    exact = [x.detach().double().requires_grad_() for x in (states, rows, bias)]
    wanted = outcome(group_nll_reference, *exact, targets, 8)
    for got, expected in zip(outcome(group_nll, states, rows, bias, targets, 8), wanted, strict=True):
        assert (got.double() - expected).norm() <= TOLERANCE[torch.float32] * expected.norm()


def test_the_kernels_repeat_to_the_bit(monkeypatch):
    monkeypatch.setattr(op, "_form", lambda states, size: kernel)
    arguments = operands(60, 50, 32, torch.float16)
    first, again = (outcome(group_nll, *arguments, 9) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_in_a_compiled_graph_it_is_the_same(backend):
    states, rows, bias, targets = operands(30, 33, 16, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(group_nll, fullgraph=True, backend=backend)
    for got, expected in zip(*(outcome(f, states, rows, bias, targets, 8) for f in (compiled, group_nll)), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_operator_keeps_the_promises_of_custom_operators():
    states, rows, bias, targets = operands(30, 33, 16, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op._losses, (states, rows, bias, targets, 8), test_utils=checks)
    plain = [x.detach() for x in (states, rows, bias)]
    nll, normalizer, order, starts = op._losses(*plain, targets, 8)
    torch.library.opcheck(op._gradients, (*plain, targets, order, starts, normalizer, nll, 8), test_utils=checks)


def test_no_floating_point_operations_are_counted_that_may_not_be_there():
    states, rows, bias, targets = operands(30, 33, 16, torch.float32)
    with FlopCounterMode(display=False) as counter:
        group_nll(states, rows, bias, targets, 8).sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("form", [group_nll, group_nll_reference])
def test_wrong_shapes_are_named(form):
    states, rows, bias, targets = operands(30, 33, 16, torch.float32)
    with pytest.raises(ValueError, match=r"states \(N, D\) and rows"):
        form(states[:, :3], rows, bias, targets, 8)
    with pytest.raises(ValueError, match="bias"):
        form(states, rows, bias[:3], targets, 8)
    with pytest.raises(ValueError, match="size"):
        form(states, rows, bias, targets, 0)
