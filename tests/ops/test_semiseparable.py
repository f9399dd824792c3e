import pytest
import torch

from phase1.ops.semiseparable import chunked, semiseparable, semiseparable_matrix, semiseparable_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 63, 64, 65, 130, 17 * 64 + 5]  # below, at and past one chunk; the last needs three levels of the scan


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(chunked, "GROUP", 4)


def operands(T, B=2, H=3, R=4, P=5, dtype=torch.float64):
    torch.manual_seed(T)
    like = {"dtype": dtype, "device": DEVICE}
    u, v = (torch.randn(B, H, T, R, **like).transpose(1, 2).requires_grad_() for _ in "uv")  # strided
    x = torch.randn(B, T, H, P, **like).requires_grad_()
    log_decay = (-torch.rand(B, T, H, **like)).requires_grad_()
    return u, v, x, log_decay, torch.randn(B, H, R, P, **like).requires_grad_()


@pytest.mark.parametrize("T", LENGTHS)
def test_output_state_and_gradients_match_the_recurrence(T):
    inputs = operands(T)
    weights = torch.randn_like(inputs[2]), torch.randn_like(inputs[4])
    outcomes = []
    for op in (semiseparable, semiseparable_reference):
        y, state = op(*inputs)
        outcomes.append((y, state, *torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), inputs)))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)  # float64: only the order of sums differs


@pytest.mark.parametrize("T", [1, 65, 130])
def test_the_operator_is_the_dense_lower_triangular_matrix(T):
    u, v, x, log_decay, _ = operands(T)
    matrix = semiseparable_matrix(u, v, log_decay)
    assert torch.equal(matrix, matrix.tril())
    y, _ = semiseparable(u, v, x, log_decay)
    torch.testing.assert_close(y, torch.einsum("bhts,bshp->bthp", matrix, x), rtol=1e-9, atol=1e-9)


def test_every_block_below_the_diagonal_has_rank_at_most_R():
    u, v, _, log_decay, _ = operands(40)
    matrix = semiseparable_matrix(u, v, log_decay)
    assert max(torch.linalg.matrix_rank(matrix[:, :, t:, :t]).max().item() for t in range(1, 40)) == 4


@pytest.mark.parametrize("op", [semiseparable, semiseparable_reference])
def test_later_inputs_do_not_reach_earlier_outputs(op):
    u, v, x, log_decay, state = operands(150)
    before = op(u, v, x, log_decay, state)[0]
    with torch.no_grad():
        for tensor in (u, v, x):
            tensor[:, 100:] += 1
        log_decay[:, 100:] -= 1
    assert torch.equal(op(u, v, x, log_decay, state)[0][:, :100], before[:, :100])


@pytest.mark.parametrize("cut", [1, 64, 90])
def test_two_pieces_joined_by_the_state_are_the_whole(cut):
    *inputs, state = operands(150)
    whole, last = semiseparable(*inputs, state)
    first, middle = semiseparable(*(tensor[:, :cut] for tensor in inputs), state)
    second, end = semiseparable(*(tensor[:, cut:] for tensor in inputs), middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-9)


def test_strong_decay_underflows_to_zero_without_nan():
    u, v, x, log_decay, state = (tensor.detach() for tensor in operands(200, dtype=torch.float32))
    y, last = semiseparable(u, v, x, log_decay * 1e4, state)
    assert y.isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("group", [4, 64])
def test_resets_take_no_digits_of_what_comes_after_them(group, monkeypatch):
    """3 % of the log decays are -1,000, whose sum over 4,096 positions leaves float32 with three digits of the others."""
    monkeypatch.setattr(chunked, "GROUP", group)
    exact = [tensor.detach().float().double() for tensor in operands(4096, B=1, H=2)]
    exact[3] = torch.where(torch.rand_like(exact[3]) < 0.03, -1000.0, 0.1 * exact[3]).float().double()
    weights = torch.randn_like(exact[2]), torch.randn_like(exact[4])
    outcomes = []
    for op, dtype in ((semiseparable, torch.float32), (semiseparable_reference, torch.float64)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        y, state = op(*inputs)
        loss = (y * weights[0].to(dtype)).sum() + (state * weights[1].to(dtype)).sum()
        outcomes.append((y, state, *torch.autograd.grad(loss, inputs)))
    for got, expected in zip(*outcomes, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_cost_of_the_scan_is_linear_in_the_length(monkeypatch):
    sizes = []
    prefix = chunked._prefix
    monkeypatch.setattr(chunked, "_prefix", lambda a, d, s: sizes.append(a[..., 0, 0].numel() * a.shape[-3]) or prefix(a, d, s))
    semiseparable(*operands(8 * 64, B=1, H=1)[:4])
    short = sum(sizes)
    sizes.clear()
    semiseparable(*operands(16 * 8 * 64, B=1, H=1)[:4])
    assert sum(sizes) / short < 16 * 1.3  # a quadratic scan would take 16 times more


@pytest.mark.parametrize("op", [semiseparable, semiseparable_reference])
def test_wrong_shapes_are_named(op):
    u, v, x, log_decay, state = operands(5)
    for bad in ((u, v[:, :4], x, log_decay), (u, v, x[:, :4], log_decay), (u, v, x, log_decay[:, :4])):
        with pytest.raises(ValueError, match="got"):
            op(*bad)
    with pytest.raises(ValueError, match="state must be"):
        op(u, v, x, log_decay, state[:, :1])
