"""What only a GPU can show of the output: products that add, replayed graphs, offsets past 2^31, compiled kernels.

Where pytest is missing, `python tests/ops/test_output_gpu.py` runs every test and prints what failed.
"""

import inspect
import math
import sys
import traceback

import torch

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
except ImportError:
    pass

from phase1.config import EngineShape
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE, tied_cross_entropy, tied_cross_entropy_reference
from phase1.ops.cross_entropy.products import _adds_in_float32, add_product
from phase1.ops.group_nll import group_nll, group_nll_reference
from phase1.ops.pointer import pointer_log_probability, pointer_log_probability_reference
from phase1.roster import model_config

HALF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # and their rounding errors
SMALL = EngineShape(vocab_size=3001, d_model=128, n_layers=2, n_heads=2, htt_dense_rows=60, htt_groups=100)

POINTERS = (  # B, T, past, window, d
    (1, 1, 0, 1, 16), (2, 45, 0, 20, 8), (3, 1000, 500, 700, 64), (8, 512, 0, 2048, 64), (1, 4099, 3, 2048, 128), (2, 777, 0, 256, 48),
)  # fmt: skip
GROUPS = (1, 1, 1, 16), (33, 239, 67, 64), (5000, 33873, 67, 512), (700, 500, 200, 130), (3000, 40, 40, 64)  # N, n, size, D
LOSSES = (1, 1, 16), (1003, 50257, 512), (4096, 16890, 512), (257, 999, 64)  # N, V, D


def leaf(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def gradients(form, leaves, *rest):
    """Of the mean of what is finite, at a loss scale of 1,024, and the result."""
    y = form(*leaves, *rest)
    mean = y.masked_fill(y == -torch.inf, 0).mean()
    return y.detach(), *(g / 1024 for g in torch.autograd.grad(mean * 1024, leaves))


def near(got, wanted, tolerance):
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        x, y = (z.double().masked_fill(z == -torch.inf, -1e3) for z in (x, y))
        assert x.isfinite().all(), f"output {i} is not finite"
        error = ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
        assert error < tolerance, f"output {i}: relative error {error:.1e}, limit {tolerance:.1e}"


def pointer(form, window, past):
    return lambda q, k, bias, ids, targets: form(q, k, bias, ids, targets, window=window, past=past)


def whole(form):
    return lambda h, table, bias, odds, targets: form(h, table, targets, bias, odds)


def cases(dtype):
    """Name, fast form, definition, leaves in `dtype`, other arguments; sizes as in training, and odd ones."""
    torch.manual_seed(0)
    for B, T, past, window, d in POINTERS:
        q, k = leaf(B, T, d, dtype=dtype), leaf(B, past + T, d, dtype=dtype)
        bias = (torch.rand(B, past + T, device="cuda") * 1e-2).cumsum(1).requires_grad_()
        ids, targets = torch.randint(50, (B, past + T), device="cuda"), torch.randint(-9, 60, (B, T), device="cuda")
        forms = (pointer(form, window, past) for form in (pointer_log_probability, pointer_log_probability_reference))
        yield f"pointer {B, T, past, window, d}", *forms, [q, k, bias], [ids, targets]
    for N, n, size, D in GROUPS:
        h, rows, bias = leaf(N, D, dtype=dtype), leaf(n, D, dtype=dtype, scale=D**-0.5), leaf(n)
        targets = torch.randint(0, n, (N,), device="cuda").masked_fill(torch.rand(N, device="cuda") < 0.5, -100)
        targets[0] = n - 1
        yield f"groups {N, n, size, D}", group_nll, group_nll_reference, [h, rows, bias], [targets, size]
    for N, V, D in LOSSES:
        h, table, bias = leaf(N, D, dtype=dtype), leaf(V, D, scale=D**-0.5), leaf(V)
        # as likely as the table's own; where a pointer is certain the gradient is nothing, which half precision rounds it to
        odds = (torch.randn(N, device="cuda") - math.log(V)).requires_grad_()
        targets = torch.randint(0, V, (N,), device="cuda")
        targets[1::5] = IGNORE
        forms = (whole(form) for form in (tied_cross_entropy, tied_cross_entropy_reference))
        yield f"loss {N, V, D}", *forms, [h, table, bias, odds], [targets]


def test_every_form_has_the_result_and_the_gradients_of_float64():
    for dtype, eps in ((torch.float32, 2**-17), *HALF.items()):
        for name, fast, exact, leaves, rest in cases(dtype):
            doubled = [x.detach().double().requires_grad_() for x in leaves]
            try:
                near(gradients(fast, leaves, *rest), gradients(exact, doubled, *rest), 16 * eps)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}: {error}") from error


def test_every_form_repeats_to_the_bit_and_is_replayed_to_the_bit():
    for name, fast, _, leaves, rest in cases(torch.float16):
        first = gradients(fast, leaves, *rest)
        assert all(torch.equal(x, y) for x, y in zip(first, gradients(fast, leaves, *rest))), name
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                gradients(fast, leaves, *rest)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(fast, leaves, *rest)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(first, captured)), f"{name}, replayed"


def test_products_are_added_to_float32_without_one_of_their_own():
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return
    for dtype in HALF:
        assert _adds_in_float32(torch.cuda.current_device(), dtype)
        sums, a, b = torch.randn(4096, 520, device="cuda"), leaf(1000, 4096, dtype=dtype).detach().T, leaf(1000, 520, dtype=dtype).detach()
        expected = sums.double() + a.double() @ b.double()
        add_product(sums.clone(), a, b)  # workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        add_product(sums, a, b)
        assert torch.cuda.max_memory_allocated() - before < 2**20
        near([sums], [expected], 1e-5)


def test_offsets_past_two_to_the_31():
    stride = 1_900_000
    room = torch.empty(2, 600, stride, dtype=torch.float16, device="cuda")
    q, k = room[..., :64], room[..., 64:128]
    room[..., :128] = torch.randn(2, 600, 128, device="cuda").half()
    ids, targets = torch.randint(20, (2, 600), device="cuda"), torch.randint(20, (2, 600), device="cuda")
    bias = torch.zeros(2, 600, device="cuda", requires_grad=True)
    outcomes = []
    for x, y in ((q, k), (q.contiguous(), k.contiguous())):
        leaves = [x.detach().requires_grad_(), y.detach().requires_grad_(), bias]
        outcomes.append(gradients(lambda *a: pointer_log_probability(*a, window=100), leaves, ids, targets))
    assert all(torch.equal(x, y) for x, y in zip(*outcomes))
    rows, group_bias = leaf(300, 64, dtype=torch.float16), leaf(300)
    members = torch.randint(0, 300, (1200,), device="cuda")
    flat = room.view(1200, stride)[:, :64]
    outcomes = [gradients(group_nll, [x.detach().requires_grad_(), rows, group_bias], members, 67) for x in (flat, flat.contiguous())]
    assert all(torch.equal(x, y) for x, y in zip(*outcomes))


def test_whole_models_in_half_precision_are_those_of_float64_and_compile_without_a_break():
    for overrides in ({}, {"htt_output": "two_level"}, {"htt_output": "two_level", "mixer": "attention", "copy_head": False}):
        torch.manual_seed(0)
        model = LanguageModel(model_config("phase1", SMALL, recompute="none", **overrides))
        ids = torch.randint(0, 3001, (2, 201))
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        targets[0, 5] = IGNORE
        expected = model.double().loss(inputs, targets)
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))])
        model, inputs, targets = model.float().cuda(), inputs.cuda(), targets.cuda()
        torch._dynamo.reset()
        for loss_of in (model.loss, torch.compile(model.loss, fullgraph=True, dynamic=False)):
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(inputs, targets)
            got = torch.cat([g.flatten() for g in torch.autograd.grad(loss * 1024, list(model.parameters()))]) / 1024
            near([loss.detach().cpu(), got.cpu()], [expected.detach(), wanted], 100 * 2**-11)


if __name__ == "__main__":
    failed = 0
    for name, test in list(globals().items()):
        if name.startswith("test_") and inspect.isfunction(test):
            try:
                test()
                print(f"passed {name}", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
    sys.exit(bool(failed))
