import pytest
import torch

import phase1.ops.pointer.blocked as blocked
from phase1.ops.pointer import pointer_log_probability, pointer_log_probability_reference, pointer_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [pointer_log_probability, pointer_log_probability_reference]


@pytest.fixture(params=[512, 6, 1], autouse=True)
def block(request, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", request.param)


def operands(T, past=0, B=3, d=4, V=5, dtype=torch.float64):
    torch.manual_seed(T)
    like = {"dtype": dtype, "device": DEVICE}
    q = (2 * torch.randn(B, d, T, **like)).transpose(1, 2).requires_grad_()  # strided
    k = torch.randn(B, past + T, 2 * d, **like)[..., ::2].requires_grad_()
    bias = torch.randn(past + T, B, **like).T.requires_grad_()
    ids = torch.randint(0, V, (past + T, B), device=DEVICE).T  # strided
    targets = torch.randint(0, V, (B, T), device=DEVICE)
    targets[:, ::3] = -100
    return q, k, bias, ids, targets


def outcome(op, inputs, **settings):
    """The result, with -inf as -1000, and the gradients of q, k and bias."""
    q, k, bias, *_ = inputs
    y = op(*inputs, **settings)
    gradients = torch.autograd.grad(y, (q, k, bias), torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=DEVICE).view_as(y))
    return y.nan_to_num(neginf=-1000.0), *gradients


@pytest.mark.parametrize(
    "T, window, past",
    [(1, 1, 0), (5, 8, 0), (8, 8, 0), (16, 8, 0), (19, 8, 0), (19, 1, 3), (1, 8, 30), (5, 8, 3), (20, 8, 9), (20, 8, 5), (5, 10**15, 0), (3, 10**15, 4)],
)
def test_output_and_gradients_match_the_definition(T, window, past):
    inputs = operands(T, past)
    for got, expected in zip(*(outcome(op, inputs, window=window, past=past) for op in FORMS), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", FORMS)
def test_the_definition_written_out(op):
    q, k, bias, ids, targets = operands(7, past=2)
    got = op(q, k, bias, ids, targets, window=4, past=2)
    for b in range(len(q)):
        for t in range(7):
            seen = range(max(0, t + 2 - 3), t + 3)
            a = torch.stack([q[b, t] @ k[b, s] / 2 + bias[b, s] for s in seen]).softmax(0)
            p = sum(weight for weight, s in zip(a, seen) if ids[b, s] == targets[b, t])
            torch.testing.assert_close(got[b, t].exp(), torch.as_tensor(p, dtype=q.dtype, device=DEVICE), rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("T", [1, 9, 16])
def test_where_nothing_matches_there_is_no_probability_and_no_gradient(op, T):
    q, k, bias, ids, targets = operands(T)
    y = op(q, k, bias, ids, targets.fill_(6), window=4)
    assert (y == -torch.inf).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(y, (q, k, bias), torch.ones_like(y)))


@pytest.mark.parametrize("op", FORMS)
def test_where_everything_matches_the_probability_is_one(op):
    q, k, bias, ids, targets = operands(11)
    y = op(q, k, bias, ids.clone().fill_(2), targets.fill_(2), window=4)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", FORMS)
def test_later_positions_and_those_before_the_window_do_not_count(op):
    q, k, bias, ids, targets = operands(40)
    before = op(q, k, bias, ids, targets, window=8)
    with torch.no_grad():
        for tensor in (q, k, bias, ids, targets):
            tensor[:, 30:] += 1
        k[:, :10] += 1
        bias[:, :10] += 1
    after = op(q, k, bias, ids, targets, window=8)
    assert torch.equal(after[:, 17:30], before[:, 17:30]) and not torch.equal(after[:, :17], before[:, :17])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float64(dtype):
    inputs = operands(40, d=16, dtype=torch.float32)
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs[:2]] + [inputs[2]]
    exact = [tensor.detach().double().requires_grad_() for tensor in half]
    got = outcome(pointer_log_probability, (*half, *inputs[3:]), window=8)
    expected = outcome(pointer_log_probability_reference, (*exact, *inputs[3:]), window=8)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    for mine, wanted in zip(got, expected, strict=True):
        assert (mine.double() - wanted).norm() / wanted.norm() < 8 * torch.finfo(dtype).eps


def test_large_scores_stay_numbers():
    q, k, bias, ids, targets = operands(20, dtype=torch.float32)
    scaled = [(1e4 * tensor).detach().requires_grad_() for tensor in (q, k, bias)]
    for result in outcome(pointer_log_probability, (*scaled, ids, targets), window=8):
        assert result.isfinite().all()


def test_no_positions_give_no_probabilities():
    q, k, bias, ids, targets = operands(0, past=3)
    for op in FORMS:
        assert op(q, k, bias, ids, targets, window=4, past=3).shape == (3, 0)


def test_a_block_of_scores_is_no_larger_than_its_limit_while_it_has_enough_queries(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 512)
    for B, T, window in ((64, 512, 2048), (39, 2048, 2048), (2, 16384, 4096), (4, 2048, 512)):
        blocks = list(blocked._blocks((B, T), window, 0))
        sizes = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in blocks]
        assert max(4 * B * C * S for C, S in sizes) <= blocked.CHUNK_BYTES and min(C for C, _ in sizes[:-1]) >= 64
        assert all(C % 8 == S % 8 == 0 for C, S in sizes[:-1]) and len(blocks) <= T // 64


def test_memory_of_the_backward_pass_does_not_hold_scores():
    saved = []
    q, k, bias, ids, targets = operands(64)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        pointer_log_probability(q, k, bias, ids, targets, window=16)
    assert max(saved) <= q.numel()


def test_the_matrix_is_banded_and_its_rows_sum_to_one():
    q, k, bias, *_ = operands(12)
    matrix = pointer_matrix(q, k, bias, 0, window=4).exp()
    assert torch.equal(matrix, matrix.tril().triu(-3))
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))


@pytest.mark.parametrize("op", FORMS)
def test_wrong_arguments_are_named(op):
    q, k, bias, ids, targets = operands(5)
    with pytest.raises(ValueError, match="window must be at least 1"):
        op(q, k, bias, ids, targets, window=0)
    with pytest.raises(ValueError, match="must hold past"):
        op(q, k, bias, ids, targets, window=2, past=1)
    with pytest.raises(ValueError, match="expected"):
        op(q, k, bias, ids, targets[:, :4], window=2)
    with pytest.raises(ValueError, match="expected"):
        op(q, k, bias, ids[:, :4], targets, window=2)
