"""The loss inside a compiled graph, without a scored target, and what it promises the tools that count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phase1.ops.cross_entropy import IGNORE, chunked, tied_cross_entropy, tied_cross_entropy_reference
from phase1.ops.cross_entropy.products import add_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(dtype=torch.float64, N=7, V=27, D=4):
    """Hidden states, table, targets, bias and log-odds; all but the targets are leaves."""
    torch.manual_seed(0)
    hidden, table, bias, odds = (
        torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_() for shape in ((N, D), (V, D), (V,), (N,))
    )
    targets = torch.arange(N, device=DEVICE) * 5 % V
    targets[2] = IGNORE
    return hidden, table, targets, bias, odds


def leaves_of(*tensors):
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("with_odds", [True, False])
def test_in_a_compiled_graph_it_is_one_node_with_the_same_loss_and_gradients(biased, with_odds, monkeypatch):
    monkeypatch.setattr(chunked, "_chunk_tokens", lambda element_size, V, parts: 3)
    hidden, table, targets, bias, odds = operands()
    bias, odds = bias if biased else None, odds if with_odds else None
    leaves = leaves_of(hidden, table, bias, odds)
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda: tied_cross_entropy(hidden, table, targets, bias, odds) * 3, fullgraph=True, backend=backend)
    outcomes = [
        (loss, *torch.autograd.grad(loss, leaves))
        for loss in (compiled(), tied_cross_entropy_reference(hidden, table, targets, bias, odds) * 3)
    ]
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert len(graphs) == 1 and sum("tied_cross_entropy" in str(target) for target in graphs[0]) == 1


@pytest.mark.parametrize("wanted", ["hidden", "table", "bias", "odds", "none"])
def test_in_a_compiled_graph_each_gradient_may_be_the_only_one_that_is_wanted(wanted):
    hidden, table, targets, bias, odds = operands()
    parts = {"hidden": [hidden], "table": [table], "bias": [bias], "odds": [odds], "none": []}
    for leaf in leaves_of(hidden, table, bias, odds):
        leaf.requires_grad_(any(leaf is mine for mine in parts[wanted]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: tied_cross_entropy(hidden, table, targets, bias, odds), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(), tied_cross_entropy_reference(hidden, table, targets, bias, odds)
    torch.testing.assert_close(loss, expected)
    if wanted != "none":
        for got, mine in zip(*(torch.autograd.grad(x, parts[wanted]) for x in (loss, expected)), strict=True):
            torch.testing.assert_close(got, mine)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("with_odds", [True, False])
def test_without_a_scored_target_there_is_no_mean_and_no_gradient(compiled, with_odds):
    hidden, table, targets, bias, odds = operands()
    leaves = leaves_of(hidden, table, bias, odds if with_odds else None)

    def loss_of(form=tied_cross_entropy):
        return form(hidden, table, targets.clone().fill_(IGNORE), bias, odds if with_odds else None)

    torch._dynamo.reset()
    for loss in (
        loss_of(tied_cross_entropy_reference),
        torch.compile(loss_of, backend="aot_eager")() if compiled else loss_of(),
    ):
        assert loss.isnan()
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))


def test_the_operator_keeps_the_promises_of_custom_operators():
    hidden, table, targets, bias, odds = operands(torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for extras, wanted in (((bias, odds), [True] * 4), ((None, None), [True, True, False, False])):
        torch.library.opcheck(chunked._operator, (hidden, table, targets, *extras, wanted, 1), test_utils=checks)
    sums, a, b = torch.zeros(5, 3, device=DEVICE), torch.randn(7, 5, device=DEVICE).T, torch.randn(7, 3, device=DEVICE)
    torch.library.opcheck(add_product, (sums, a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_product_is_added_where_the_sums_are(dtype):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    room = torch.randn(24, 40, device=DEVICE, dtype=wide)
    sums, before = room[:, :24], room.clone()
    a, b = torch.randn(64, 24, device=DEVICE).to(dtype).T, torch.randn(64, 24, device=DEVICE).to(dtype)
    add_product(sums, a, b)
    expected = before[:, :24].double() + a.double() @ b.double()
    eps = torch.finfo(dtype if DEVICE == "cpu" else wide).eps  # a product of its own is rounded, one that adds is not
    assert (sums.double() - expected).norm() < 64 * eps * expected.norm()
    assert torch.equal(room[:, 24:], before[:, 24:])


@pytest.mark.parametrize("compiled", [True, False])
def test_floating_point_operations_are_those_of_three_products(compiled):
    hidden, table, targets, bias, odds = operands(torch.float32, V=24)
    torch._dynamo.reset()
    loss_of = torch.compile(tied_cross_entropy, backend="aot_eager") if compiled else tied_cross_entropy
    loss_of(hidden, table, targets, None, odds)
    with FlopCounterMode(display=False) as counter:
        loss_of(hidden, table, targets, None, odds).backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 24 * 4
