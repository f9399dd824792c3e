import pytest
import torch

from phase1.ops.htt import Cores, htt_lookup_reference, htt_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cores(v1=5, v2=3, rank=4, d1=2, d2=6, bias=True):
    torch.manual_seed(0)
    shapes = [(v1, rank, d1), (v2, rank, d2), (v1, rank), (v2, rank)] + [(v2, d1 * d2)] * bias
    tensors = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in shapes]
    return Cores(*tensors) if bias else Cores(*tensors, None)


@pytest.mark.parametrize("bias", [True, False])
def test_the_table_matches_the_definition_with_gradients(bias):
    parameters = cores(bias=bias)
    leaves = [tensor for tensor in parameters if tensor is not None]
    positions = torch.tensor([[0, 14, 7], [7, 1, 3]], device=DEVICE)
    weights = torch.randn(2, 3, 12, dtype=torch.float64, device=DEVICE)
    ways = (htt_table(parameters, torch.float64)[positions], htt_lookup_reference(positions, parameters))
    outcomes = [(rows, *torch.autograd.grad((rows * weights).sum(), leaves)) for rows in ways]
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 3, 7, 14, 15])
def test_the_first_rows_have_the_gradients_of_a_part_of_all(n):
    parameters = cores()
    leaves = [tensor for tensor in parameters if tensor is not None]
    weights = torch.randn(n, 12, dtype=torch.float64, device=DEVICE)
    tables = (htt_table(parameters, torch.float64, n), htt_table(parameters, torch.float64)[:n])
    outcomes = [(rows, *torch.autograd.grad((rows * weights).sum(), leaves)) for rows in tables]
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_phases_change_the_map():
    parameters = cores()
    turned = parameters._replace(phase_a=parameters.phase_a + 0.5)
    assert not torch.allclose(htt_table(parameters, torch.float64), htt_table(turned, torch.float64))


def test_the_reference_names_the_range():
    with pytest.raises(ValueError, match="between 0 and 14; got 3 to 15"):
        htt_lookup_reference(torch.tensor([3, 15], device=DEVICE), cores())
