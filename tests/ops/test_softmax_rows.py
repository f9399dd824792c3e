"""The kernel against the definition: compiled on a GPU, in Triton's interpreter without one (tests/conftest.py)."""

import pytest
import torch

from phase1.ops.cross_entropy.rows import softmax_rows_reference

pytest.importorskip("triton")

from phase1.ops.cross_entropy.kernel import softmax_rows_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(n, V, dtype, gap=0, scale=3.0):
    torch.manual_seed(n + V)
    logits = (torch.randn(n, V + gap, dtype=torch.float64) * scale).to(dtype)
    column, weights = torch.randint(V, (n,)), torch.rand(n) < 0.8
    wide = torch.promote_types(dtype, torch.float32)
    parts = logits, torch.linspace(-2, 1, V, dtype=wide), column, torch.full((n,), torch.nan, dtype=wide), weights
    return tuple(part.to(DEVICE) for part in parts)


@pytest.mark.parametrize("n,V,gap", [(1, 1, 0), (3, 7, 1), (5, 4096, 0), (2, 4097, 7), (3, 9001, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernel_writes_what_the_definition_writes(n, V, gap, dtype, biased, gradient):
    logits, bias, column, picked, weights = operands(n, V, dtype, gap)
    logits[:, V:] = 7
    expected, expected_picked = logits.double()[:, :V], picked.double()
    softmax_rows_reference(expected, bias.double() if biased else None, column, expected_picked, weights if gradient else None)
    softmax_rows_kernel(logits[:, :V], bias if biased else None, column, picked, weights if gradient else None)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(picked.double(), expected_picked, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    rounding = eps if dtype in (torch.float16, torch.bfloat16) else 32 * eps  # exponents of size 20 are rounded too
    torch.testing.assert_close(logits[:, :V].double(), expected, rtol=rounding, atol=max(eps * 1e-3, 1e-14))
    assert (logits[:, V:] == 7).all(), "nothing between the rows is touched"


@pytest.mark.parametrize("n,V,gap", [(1, 1, 0), (5, 7, 1), (4, 4097, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernel_weighs_gradients_by_log_odds_as_the_definition_does(n, V, gap, dtype, gradient):
    logits, bias, column, picked, weights = operands(n, V, dtype, gap)
    odds = torch.tensor([-5.0, -torch.inf, 0.5, 200.0, -200.0], dtype=picked.dtype, device=DEVICE)[:n]
    expected, expected_picked = logits.double()[:, :V], picked.double()
    weights = weights if gradient else None
    softmax_rows_reference(expected, bias.double(), column, expected_picked, weights, odds.double())
    softmax_rows_kernel(logits[:, :V], bias, column, picked, weights, odds)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(picked.double(), expected_picked, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    rounding = eps if dtype in (torch.float16, torch.bfloat16) else 32 * eps
    torch.testing.assert_close(logits[:, :V].double(), expected, rtol=rounding, atol=max(eps * 1e-3, 1e-14))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_makes_its_row_and_no_other_one_nan(value):
    logits, bias, column, picked, weights = operands(3, 100, torch.float16)
    logits[1, 30], weights[:] = value, True
    softmax_rows_kernel(logits, bias, column, picked, weights)
    assert picked.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all() and logits[::2].isfinite().all()


def test_rows_of_very_different_size_neither_overflow_nor_vanish():
    logits, _, column, picked, weights = operands(4, 5000, torch.float16, scale=10000.0)
    weights[:] = True
    expected, expected_picked = logits.double(), picked.double()
    softmax_rows_reference(expected, None, column, expected_picked, weights)
    softmax_rows_kernel(logits, None, column, picked, weights)
    torch.testing.assert_close(picked.double(), expected_picked, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-6)
