import pytest
import torch

from phase1.ops.anchored_rows import anchored_rows, anchored_rows_reference, bags, users_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(n, k, K=7, D=6):
    torch.manual_seed(n)
    like = {"dtype": torch.float64, "device": DEVICE}
    rows = torch.randn(D, K, **like).T.requires_grad_()  # strided
    return rows, torch.randn(n, k, **like).requires_grad_(), torch.randint(K, (n, k), device=DEVICE)


@pytest.mark.parametrize("n, k", [(1, 1), (5, 3), (64, 2), (65, 4), (3, 9)])
def test_output_and_gradients_match_the_definition(n, k, monkeypatch):
    monkeypatch.setattr(bags, "CHUNK_ROWS", 16)
    rows, weights, anchors = operands(n, k)
    outcomes = []
    for op in (lambda *args: anchored_rows(*args, users_of(anchors, len(rows))), anchored_rows_reference):
        y = op(rows, weights, anchors)
        outcomes.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), (rows, weights))))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_row_that_nobody_uses_has_no_gradient():
    rows, weights, _ = operands(4, 2)
    anchors = torch.tensor([[0, 1], [1, 1], [5, 0], [5, 5]], device=DEVICE)
    anchored_rows(rows, weights, anchors, users_of(anchors, 7)).sum().backward()
    assert [bool(g.any()) for g in rows.grad] == [True, True, False, False, False, True, False]


def test_wrong_shapes_are_named():
    rows, weights, anchors = operands(5, 2)
    for op in (lambda *args: anchored_rows(*args, users_of(anchors, 7)), anchored_rows_reference):
        with pytest.raises(ValueError, match="expected; got"):
            op(rows, weights[:, :1], anchors)
