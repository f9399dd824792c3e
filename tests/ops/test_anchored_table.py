import pytest
import torch

from phase1.ops.anchored_table import anchored_table, anchored_table_reference, inverse_index, levels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(levels, k, D=6):
    torch.manual_seed(k)
    like = {"dtype": torch.float64, "device": DEVICE}
    past = levels[-1] - levels[0]
    begin = torch.tensor([max(start for start in levels if start <= i) for i in range(levels[0], levels[-1])], device=DEVICE)
    anchors = (torch.rand(past, k, device=DEVICE) * begin[:, None]).long()
    return torch.randn(levels[-1], D, **like).requires_grad_(), torch.randn(past, k, **like).requires_grad_(), anchors


def fast(own, weights, anchors, levels):
    return anchored_table(own * 1, weights, anchors, levels, inverse_index(anchors, levels))  # it overwrites what it is given


@pytest.mark.parametrize("places", [[3, 4], [7, 12], [2, 4, 8, 16, 90], [5, 6, 7, 8, 9], [20, 20]], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_output_and_gradients_match_the_definition(places, k, monkeypatch):
    monkeypatch.setattr(levels, "CHUNK_ROWS", 16)
    own, weights, anchors = operands(places, k)
    outcomes = []
    for op in (fast, anchored_table_reference):
        y = op(own, weights, anchors, places)
        outcomes.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), (own, weights), allow_unused=True)))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, rtol=1e-10, atol=1e-10)


def test_the_table_solves_its_equation():
    places = [4, 8, 30]
    own, weights, anchors = operands(places, 3)
    matrix = torch.zeros(30, 30, dtype=torch.float64, device=DEVICE)
    for i in range(4, 30):
        for weight, anchor in zip(weights[i - 4].tolist(), anchors[i - 4].tolist()):
            matrix[i, anchor] += weight
    expected = torch.linalg.solve(torch.eye(30, dtype=torch.float64, device=DEVICE) - matrix, own)
    torch.testing.assert_close(fast(own, weights, anchors, places), expected, rtol=1e-9, atol=1e-9)


def test_a_row_that_nobody_uses_has_its_own_gradient_alone():
    own, weights, _ = operands([7, 11], 2)
    anchors = torch.tensor([[0, 1], [1, 1], [5, 0], [5, 5]], device=DEVICE)
    fast(own, weights, anchors, [7, 11]).sum().backward()
    assert [bool((g != 1).any()) for g in own.grad] == [True, True, False, False, False, True] + [False] * 5


def test_wrong_shapes_and_levels_are_named():
    own, weights, anchors = operands([5, 9], 2)
    for op in (fast, anchored_table_reference):
        with pytest.raises(ValueError, match="expected; got"):
            op(own, weights[:, :1], anchors, [5, 9])
        with pytest.raises(ValueError, match="expected; got"):
            op(own, weights[1:], anchors[1:], [5, 9])
        with pytest.raises(ValueError, match="levels must rise"):
            op(own, weights, anchors, [5, 8])
