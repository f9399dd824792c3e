import pytest
import torch

from phase1.ops.cross_entropy import IGNORE, chunked, tied_cross_entropy, tied_cross_entropy_reference, tied_nll

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[1, 3, 7, 100])
def chunk_tokens(request, monkeypatch):
    monkeypatch.setattr(chunked, "_chunk_tokens", lambda element_size, V, parts: request.param)


def operands(N=7, V=11, D=4, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, device=DEVICE).requires_grad_()
    table = torch.randn(D, V, dtype=dtype, device=DEVICE).T.requires_grad_()  # strided
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[2] = IGNORE
    return hidden, table, targets


def bias_like(table):
    return torch.linspace(-2, 2, len(table), dtype=table.dtype, device=DEVICE).requires_grad_()


@pytest.mark.parametrize("biased", [True, False])
def test_loss_and_gradients_match_the_definition(chunk_tokens, biased):
    hidden, table, targets = operands()
    bias = bias_like(table) if biased else None
    leaves = (hidden, table, bias) if biased else (hidden, table)
    outcomes = []
    for op in (tied_cross_entropy, tied_cross_entropy_reference):
        loss = op(hidden, table, targets, bias)
        outcomes.append((loss, *torch.autograd.grad(loss * 3, leaves)))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [tied_cross_entropy, tied_cross_entropy_reference])
def test_rows_of_zeros_after_those_that_have_a_bias_change_nothing(op):
    hidden, table, targets = operands()
    bias, outcomes = bias_like(table), []
    for zeros in (0, 5):
        rows = torch.cat([table, table.new_zeros(zeros, table.shape[1])])
        loss = op(hidden, rows, targets, bias)
        nll = tied_nll(hidden, rows, targets, bias)
        outcomes.append((loss, nll, *torch.autograd.grad(loss, (hidden, table, bias))))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="zeros at its end; got 11 of 14"):
        op(hidden, table.new_zeros(14, table.shape[1]), targets, bias)


def test_parts_hold_fewer_logits_and_give_the_same_loss(monkeypatch):
    hidden, table, targets = operands()
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 6 * 8 * len(table))
    original, sizes = chunked.softmax_rows, []
    monkeypatch.setattr(chunked, "softmax_rows", lambda *a: sizes.append(len(a[0])) or original(*a))
    losses = [tied_cross_entropy(hidden, table, targets, parts=parts) for parts in (1, 2, 3)]
    assert sizes == [6, 1, 3, 3, 1, 2, 2, 2, 1]
    assert max(losses) - min(losses) < 1e-12


def test_gradcheck_in_float64():
    hidden, table, targets = operands(N=4, V=5, D=3)
    assert torch.autograd.gradcheck(lambda h, t: tied_cross_entropy(h, t, targets), (hidden, table))


def odds_like(targets, dtype=torch.float64):
    """Log-odds between certain and impossible, impossible for one that is scored and one that is not."""
    odds = torch.linspace(-6, 5, len(targets), dtype=dtype, device=DEVICE)
    odds[1] = odds[2] = -torch.inf
    return odds.requires_grad_()


@pytest.mark.parametrize("biased", [True, False])
def test_with_log_odds_loss_and_gradients_are_those_of_the_sum_of_probabilities(chunk_tokens, biased):
    hidden, table, targets = operands()
    bias, odds, scored = bias_like(table) if biased else None, odds_like(targets), targets != IGNORE
    leaves = tuple(leaf for leaf in (hidden, table, odds, bias) if leaf is not None)
    p = (hidden @ table.T + (bias if biased else 0)).softmax(1).gather(1, targets.where(scored, 0)[:, None])[:, 0]
    direct = -(p + odds.exp())[scored].log().mean()
    outcomes = [(direct, *torch.autograd.grad(direct * 3, leaves))]
    for op in (tied_cross_entropy, tied_cross_entropy_reference):
        loss = op(hidden, table, targets, bias, odds)
        outcomes.append((loss, *torch.autograd.grad(loss * 3, leaves)))
    for outcome in outcomes[1:]:
        for got, expected in zip(outcome, outcomes[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)  # softplus is x above 20
    assert outcomes[1][3][1] == outcomes[1][3][2] == 0


@pytest.mark.parametrize("op", [tied_cross_entropy, tied_cross_entropy_reference])
def test_log_odds_that_are_all_impossible_leave_the_loss_and_wrong_shapes_are_named(op):
    hidden, table, targets = operands()
    none = torch.full_like(targets, -torch.inf, dtype=torch.float64).requires_grad_()
    losses = op(hidden, table, targets), op(hidden, table, targets, None, none)
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    for got, expected in zip(*(torch.autograd.grad(loss, (hidden, table)) for loss in losses), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-16)
    with pytest.raises(ValueError, match="log_odds must be"):
        op(hidden, table, targets, None, none[:3])


def test_gradcheck_with_log_odds_in_float64():
    hidden, table, targets = operands(N=4, V=5, D=3)
    bias, finite = bias_like(table), torch.tensor([-3.0, 0.5, 1.0], dtype=torch.float64, device=DEVICE).requires_grad_()

    def loss(h, t, b, o):
        return tied_cross_entropy(h, t, targets, b, torch.cat([o, o.new_full((1,), -torch.inf)]))

    assert torch.autograd.gradcheck(loss, (hidden, table, bias, finite))


def test_losses_of_single_tokens_sum_to_the_mean(chunk_tokens):
    hidden, table, targets = operands()
    bias = bias_like(table)
    nll = tied_nll(hidden, table, targets, bias)
    assert nll[2] == 0
    torch.testing.assert_close(nll.sum() / 6, tied_cross_entropy_reference(hidden, table, targets, bias))


@pytest.mark.parametrize("with_odds", [True, False])
def test_half_precision_gradients_are_those_of_float64(with_odds):
    hidden, table, targets = operands(N=64, V=500, D=32, dtype=torch.float32)
    bias = bias_like(table)
    half = hidden.half().detach().requires_grad_()
    odds = odds_like(targets, torch.float32) if with_odds else None
    tied_cross_entropy(half, table, targets, bias, odds).backward()
    leaves = (hidden, table, bias, odds)[: 3 + with_odds]
    loss = tied_cross_entropy_reference(
        hidden.double(), table.double(), targets, bias.double(), odds.double() if with_odds else None
    )
    gradients = (half.grad, *(leaf.grad for leaf in leaves[1:]))
    for got, wanted in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
        # fp16 rounds operands and logits (2^-11 of numbers up to ~20): about 1e-2 relative
        assert (got.double() - wanted.double()).norm() / wanted.double().norm() < 2e-2


def test_each_gradient_may_be_the_only_one_that_is_wanted():
    leaves = (*operands()[:2], bias_like(operands()[1]))
    targets = operands()[2]
    expected = torch.autograd.grad(tied_cross_entropy_reference(leaves[0], leaves[1], targets, leaves[2]), leaves)
    for i, wanted in enumerate(expected):
        hidden, table, bias = (leaf if i == j else leaf.detach() for j, leaf in enumerate(leaves))
        torch.testing.assert_close(torch.autograd.grad(tied_cross_entropy(hidden, table, targets, bias), leaves[i])[0], wanted)


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunked.USUAL_PARTS * 4 * 1000 * 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    hidden, table, targets = operands(N=200, V=1000, D=4)
    with Watch():
        tied_cross_entropy(hidden, table, targets).backward()
    assert largest <= 8 * 1000


@pytest.mark.parametrize("op", [tied_cross_entropy, tied_cross_entropy_reference, tied_nll])
def test_wrong_shapes_are_named(op):
    hidden, table, targets = operands()
    with pytest.raises(ValueError, match="must share D"):
        op(hidden[:, :3], table, targets)
    with pytest.raises(ValueError, match="targets must be"):
        op(hidden, table, targets[:3])
    with pytest.raises(ValueError, match="bias must be"):
        op(hidden, table, targets, bias_like(table)[:3])


def test_half_precision_reads_nothing_past_the_logits_of_a_row(monkeypatch):
    """Memory that nobody has written holds NaN here; oneDNN's products in bfloat16 read some of it on CPUs that have AMX."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        leaves = [torch.randn(n, 32, device=DEVICE).bfloat16().requires_grad_() for n in (106, 300)]
        loss = tied_cross_entropy(*leaves, torch.arange(106, device=DEVICE))
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))
        assert tied_nll(*leaves, torch.arange(106, device=DEVICE)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(was)
