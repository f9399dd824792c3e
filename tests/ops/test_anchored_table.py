"""Anchored tables: embedding bags and the kernels (in Triton's interpreter without a GPU) against the definition."""

from itertools import pairwise

import pytest
import torch

from phase1.ops.anchored_table import anchored_table, anchored_table_reference, inverse_index, op
from phase1.ops.anchored_table import levels as bags

pytest.importorskip("triton")

from phase1.ops.anchored_table import kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [(bags, torch.float64), *((form, dtype) for form in (bags, kernel) for dtype in TOLERANCE if dtype != torch.float64)]
PLACES = [[3, 4], [7, 12], [2, 4, 8, 16, 90], [5, 6, 7, 8, 9], [20, 20], [3, 9, 9, 14]]


def operands(levels, k, D=6, dtype=torch.float64, widths=(), popular=False):
    """Own parts that end with the levels, of `widths` before the last; anchors often row 1 if that is `popular`."""
    torch.manual_seed(k + D)
    like = {"dtype": torch.promote_types(dtype, torch.float32), "device": DEVICE}
    past = levels[-1] - levels[0]
    begin = torch.tensor([max(start for start in levels if start <= i) for i in range(levels[0], levels[-1])], device=DEVICE)
    anchors = (torch.rand(past, k, device=DEVICE) * begin[:, None]).long()
    if popular:
        anchors[torch.rand(past, k, device=DEVICE) < 0.8] = 1
    bounds = [0, *levels] if widths else [0, levels[-1]]
    sizes = [(end - start, width) for (start, end), width in zip(pairwise(bounds), [D, *widths, *[D] * len(levels)])]
    own = [torch.randn(n, width, **like) for n, width in sizes]
    own[-1] = own[-1].to(dtype)  # as the tail's rows come
    return [x.requires_grad_() for x in own], (torch.randn(past, k, **like) / k).requires_grad_(), anchors


def fast(own, weights, anchors, levels, dtype=torch.float64):
    return anchored_table(own, weights, anchors, levels, inverse_index(anchors, levels), dtype)


def outcome(form, own, weights, anchors, levels, dtype):
    table = form(own, weights, anchors, levels, dtype)
    torch.manual_seed(3)
    d_table = torch.randn(table.shape, device=DEVICE).to(dtype)
    return table, *torch.autograd.grad(table, (*own, weights), d_table, allow_unused=True)


def compare(form, own, weights, anchors, levels, dtype, monkeypatch):
    """Outputs and gradients of `form` are those of the definition in float64."""
    monkeypatch.setattr(op, "_form", lambda *_: form)
    monkeypatch.setattr(bags, "CHUNK_ROWS", 16)
    exact = [x.detach().double().requires_grad_() for x in (*own, weights)]
    wanted = outcome(anchored_table_reference, exact[:-1], exact[-1], anchors, levels, torch.float64)
    got = outcome(fast, own, weights, anchors, levels, dtype)
    for y, expected, kind in zip(got, wanted, (dtype, *(x.dtype for x in (*own, weights))), strict=True):
        expected = torch.zeros_like(y) if expected is None else expected
        assert y.dtype == kind and y.shape == expected.shape
        assert (y.double() - expected).abs().sum() <= TOLERANCE[dtype] * (expected.abs().sum() + 1e-3), kind


@pytest.mark.parametrize("form, dtype", CASES, ids=str)
@pytest.mark.parametrize("levels", PLACES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_output_and_gradients_match_the_definition(form, dtype, levels, k, monkeypatch):
    own, weights, anchors = operands(levels, k, dtype=dtype)
    compare(form, own, weights, anchors, levels, dtype, monkeypatch)


@pytest.mark.parametrize("form", [bags, kernel])
def test_rows_of_zeros_at_the_end_change_no_other_row_and_no_gradient(form, monkeypatch):
    monkeypatch.setattr(op, "_form", lambda *_: form)
    levels = [4, 8, 20]
    own, weights, anchors = operands(levels, 3, dtype=torch.float32)
    found, d_table = inverse_index(anchors, levels), torch.randn(25, 6, device=DEVICE)
    tables = [anchored_table(own, weights, anchors, levels, found, torch.float32, zeros) for zeros in (0, 5)]
    assert torch.equal(tables[1][:20], tables[0]) and not tables[1][20:].any() and len(tables[1]) == 25
    grads = [torch.autograd.grad(table, (*own, weights), d_table[: len(table)], retain_graph=True) for table in tables]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
    with torch.no_grad():
        plain = anchored_table(own, weights, anchors, levels, found, torch.float32, 5)
    torch.testing.assert_close(plain, tables[1])


@pytest.mark.parametrize("form, dtype", CASES, ids=str)
@pytest.mark.parametrize(
    "levels, D, widths", [([4, 8, 20], 24, (7, 24)), ([6, 6, 30], 33, (1, 0)), ([3, 50], 16, (2,))], ids=str
)
def test_parts_of_fewer_coordinates_and_other_types(form, dtype, levels, D, widths, monkeypatch):
    own, weights, anchors = operands(levels, 3, D, dtype, widths)
    compare(form, own, weights, anchors, levels, dtype, monkeypatch)


@pytest.mark.parametrize("form, dtype", CASES, ids=str)
@pytest.mark.parametrize("levels, k", [([2, 5, 200], 1), ([3, 20, 60, 100], 4)], ids=str)
def test_a_row_that_very_many_use(form, dtype, levels, k, monkeypatch):
    """Its users fill whole chunks, more than a program adds at once, in several levels, and leave some over."""
    monkeypatch.setattr("phase1.ops.anchored_table.inverse.CHUNK", 8)
    monkeypatch.setattr(kernel, "CHUNK", 8)
    monkeypatch.setattr(kernel, "SUMMED", 32)
    own, weights, anchors = operands(levels, k, 8, dtype, popular=True)
    assert (anchors == 1).sum() > 15 * 8
    compare(form, own, weights, anchors, levels, dtype, monkeypatch)


def test_a_chunk_of_the_default_length(monkeypatch):
    own, weights, anchors = operands([2, 200], 1, 8, torch.float32, popular=True)
    assert inverse_index(anchors, [2, 200]).chunk_offsets[-1] == 2
    compare(kernel, own, weights, anchors, [2, 200], torch.float32, monkeypatch)


def test_every_user_is_in_one_place_and_whole_chunks_are_counted():
    levels = [3, 70, 300, 500]
    anchors = operands(levels, 4, popular=True)[2]
    found, flat = inverse_index(anchors, levels), anchors.flatten()
    assert len(found.offsets) == len(found.chunk_offsets) == 301 and len(found.chunk_rows) == len(flat) // kernel.CHUNK
    for row in range(300):
        of_row = found.indices[found.offsets[row] : found.offsets[row + 1]]
        assert torch.equal(of_row, (flat == row).nonzero().flatten())
        chunk_rows = (found.chunk_rows == row).nonzero().flatten()
        assert torch.equal(chunk_rows, torch.arange(found.chunk_offsets[row], found.chunk_offsets[row + 1], device=DEVICE))
        assert len(chunk_rows) == len(of_row) // kernel.CHUNK


def test_the_table_solves_its_equation():
    levels = [4, 8, 30]
    (own,), weights, anchors = operands(levels, 3)
    matrix = torch.zeros(30, 30, dtype=torch.float64, device=DEVICE)
    for i in range(4, 30):
        for weight, anchor in zip(weights[i - 4].tolist(), anchors[i - 4].tolist()):
            matrix[i, anchor] += weight
    expected = torch.linalg.solve(torch.eye(30, dtype=torch.float64, device=DEVICE) - matrix, own)
    torch.testing.assert_close(fast([own], weights, anchors, levels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [bags, kernel])
def test_a_row_that_nobody_uses_has_its_own_gradient_alone(form, monkeypatch):
    monkeypatch.setattr(op, "_form", lambda *_: form)
    (own,), weights, _ = operands([7, 11], 2, dtype=torch.float32)
    anchors = torch.tensor([[0, 1], [1, 1], [5, 0], [5, 5]], device=DEVICE)
    fast([own], weights, anchors, [7, 11], torch.float32).sum().backward()
    assert [bool((g != 1).any()) for g in own.grad] == [True, True, False, False, False, True] + [False] * 5


def test_the_kernels_repeat_to_the_bit(monkeypatch):
    monkeypatch.setattr(op, "_form", lambda *_: kernel)
    levels = [4, 8, 300]
    arguments = operands(levels, 3, 20, torch.float16, (5, 20), popular=True)
    first, again = (outcome(fast, *arguments, levels, torch.float16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("form", [bags, kernel])
def test_in_a_compiled_graph_it_is_the_same(form, monkeypatch):
    monkeypatch.setattr(op, "_form", lambda *_: form)
    levels = [4, 8, 30]
    own, weights, anchors = operands(levels, 3, 12, torch.float16, (5, 12))
    found = inverse_index(anchors, levels)

    def run(own, weights, anchors, levels, dtype):
        return anchored_table([x * 2 for x in own], weights, anchors, levels, found, dtype)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(*(outcome(f, own, weights, anchors, levels, torch.float16) for f in (compiled, run)), strict=True):
        assert torch.equal(got, expected)


def test_the_operator_keeps_the_promises_of_custom_operators():
    levels = [4, 8, 30]
    own, weights, anchors = operands(levels, 3, 12, torch.float16, (5, 12))
    found = list(inverse_index(anchors, levels))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op._table, (own, weights, anchors, levels, found, torch.float16, 3), test_utils=checks)
    own, weights = [x.detach() for x in own], weights.detach()
    table = op._table(own, weights, anchors, levels, found, torch.float16, 0)
    torch.library.opcheck(op._gradients, (table, table, own[:2], weights, anchors, found, levels), test_utils=checks)


def test_wrong_shapes_and_levels_are_named():
    (own,), weights, anchors = operands([5, 9], 2)
    for form in (fast, anchored_table_reference):
        for parts, w, a in (([own], weights[:, :1], anchors), ([own], weights[1:], anchors[1:]), ([own[1:]], weights, anchors),
                            ([own[:3, :2], own[3:]], weights, anchors), ([own[0]], weights, anchors)):  # fmt: skip
            with pytest.raises(ValueError, match="expected; got"):
                form(parts, w, a, [5, 9], torch.float64)
        with pytest.raises(ValueError, match="levels must rise"):
            form([own], weights, anchors, [5, 11, 9], torch.float64)


def test_without_a_gradient_to_come_the_table_is_the_same(monkeypatch):
    levels = [4, 8, 30]
    own, weights, anchors = operands(levels, 3, 12, torch.float32, (5, 12))
    with_operator = fast(own, weights, anchors, levels, torch.float32)
    with torch.no_grad():
        assert torch.equal(fast(own, weights, anchors, levels, torch.float32), with_operator)
