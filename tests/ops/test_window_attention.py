import pytest
import torch

from phase1.ops.window_attention import window_attention, window_attention_matrix, window_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(T, past=0, B=2, H=3, R=4, P=5):
    torch.manual_seed(T)
    like = {"dtype": torch.float64, "device": DEVICE}
    q = torch.randn(B, H, T, R, **like).transpose(1, 2).requires_grad_()  # strided
    k, x = (torch.randn(B, past + T, H, width, **like).requires_grad_() for width in (R, P))
    return q, k, x


@pytest.mark.parametrize(
    "T, window, past", [(1, 1, 0), (5, 8, 0), (8, 8, 0), (19, 8, 0), (19, 1, 3), (1, 8, 30), (5, 8, 3), (20, 8, 9), (5, 10**15, 0), (3, 10**15, 4)]
)
def test_output_and_gradients_match_the_banded_matrix(T, window, past):
    inputs = operands(T, past)
    outcomes = []
    for op in (window_attention, window_attention_reference):
        y = op(*inputs, window=window, past=past)
        outcomes.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), inputs)))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_matrix_is_banded_and_its_rows_sum_to_one():
    q, k, _ = operands(12)
    matrix = window_attention_matrix(q, k, 0, window=4)
    assert torch.equal(matrix, matrix.tril().triu(-3))
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))


@pytest.mark.parametrize("op", [window_attention, window_attention_reference])
def test_later_inputs_do_not_reach_earlier_outputs(op):
    q, k, x = operands(40)
    before = op(q, k, x, window=8)
    with torch.no_grad():
        for tensor in (q, k, x):
            tensor[:, 30:] += 1
    assert torch.equal(op(q, k, x, window=8)[:, :30], before[:, :30])


@pytest.mark.parametrize("op", [window_attention, window_attention_reference])
def test_wrong_arguments_are_named(op):
    q, k, x = operands(5)
    with pytest.raises(ValueError, match="window must be at least 1"):
        op(q, k, x, window=0)
    with pytest.raises(ValueError, match="must hold past"):
        op(q, k, x, window=2, past=1)
    with pytest.raises(ValueError, match="expected"):
        op(q, k, x[:, :4], window=2)
