import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from phase1.measure.memory.estimate import cuda_autocast as imitate
from phase1.measure.memory.estimate.cuda_autocast import imitated_cuda
from phase1.measure.memory.tracker import MemoryTracker


def live_bytes(tracker):
    return sum(tracker.trace.blocks[index].size for index in tracker.live())


def test_tensors_of_any_size_take_no_memory_and_questions_have_an_answer():
    with imitated_cuda():
        x = torch.ones(1 << 40)
        assert x.shape == (1 << 40,)
        assert x.sum().item() == 0
        assert torch.equal(x, x)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_rests_meanwhile_and_is_left_as_it_was(enabled):
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(KeyError), imitated_cuda():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("function", [torch.exp, F.softplus, torch.sum, lambda x: x.cumsum(0), lambda x: x.softmax(1)])
def test_autocast_computes_in_float32_what_cuda_does(function):
    with imitated_cuda():
        x = torch.ones(8, 8, dtype=torch.float16)
        assert function(x).dtype == torch.float16
        with torch.autocast("cpu", torch.float16):
            assert function(x).dtype == torch.float32
            assert F.silu(x).dtype == (x @ x).dtype == torch.float16


def test_what_the_backward_pass_recomputes_is_cast_like_the_first_time():
    with imitated_cuda():
        x = torch.ones(8, 8, requires_grad=True)
        with torch.autocast("cpu", torch.float16):
            loss = checkpoint(lambda x: (x @ x).exp().sum(), x, use_reentrant=False)  # fails where metadata differ
        loss.backward()
        assert x.grad.shape == (8, 8)


def test_rms_norm_saves_its_input_and_one_number_per_row():
    with imitated_cuda(), MemoryTracker(1, "cpu") as tracker:
        x, weight = torch.ones(64, 1024, requires_grad=True), torch.ones(1024, requires_grad=True)
        before = live_bytes(tracker)
        y = F.rms_norm(x, (1024,), weight)
        assert live_bytes(tracker) - before == 64 * 1024 * 4 + 64 * 4
        y.sum().backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("in_float32", [False, True])
def test_autocast_leaves_rms_norm_alone_before_pytorch_2_12(monkeypatch, in_float32):
    monkeypatch.setattr(imitate, "_RMS_NORM_IN_FLOAT32", in_float32)
    with imitated_cuda(), torch.autocast("cpu", torch.float16):
        assert F.rms_norm(torch.ones(8, 8, dtype=torch.float16), (8,)).dtype == (torch.float32 if in_float32 else torch.float16)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_softmax_to_float32_reads_half_precision_without_a_copy(function, dtype):
    with imitated_cuda(), MemoryTracker(1, "cpu") as tracker:
        x = torch.ones(64, 1024, dtype=dtype, requires_grad=True)
        before = live_bytes(tracker)
        tracker.mark("start")
        y = function(x, 1, dtype=torch.float32)
        assert live_bytes(tracker) - before == 64 * 1024 * 4
        assert len([event for event in tracker.trace.events if event >= 0]) == 1
        y.sum().backward()
        assert x.grad.dtype == dtype


B, H, T, S, R, P = 4, 2, 64, 96, 32, 48


def masked_attention():
    """Its output, the operands and the bytes that the call left alive, in half precision."""
    with MemoryTracker(1, "cpu") as tracker:
        q, k, v = (torch.ones(B, n, H, d, dtype=torch.float16, requires_grad=True) for n, d in ((T, R), (S, R), (S, P)))
        mask = torch.ones(B, 1, T, S, dtype=torch.bool)
        before = live_bytes(tracker)
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return y, (q, k, v), live_bytes(tracker) - before


def test_masked_attention_saves_its_output_the_mask_as_a_bias_and_one_number_per_query():
    with imitated_cuda():
        y, operands, kept = masked_attention()
        assert (y.shape, y.dtype, y.transpose(1, 2).is_contiguous()) == ((B, H, T, P), torch.float16, True)
        assert kept == 2 * B * T * H * P + 2 * B * T * S + 4 * B * H * T
        y.sum().backward()
        assert [x.grad.shape for x in operands] == [x.shape for x in operands]


def test_masked_attention_sums_the_gradient_of_its_queries_in_float32():
    with imitated_cuda():
        y, operands, _ = masked_attention()
        with MemoryTracker(1, "cpu") as tracker:
            tracker.mark("start")
            torch.autograd.grad(y, operands, torch.ones_like(y))
        sizes = [tracker.trace.blocks[event].size for event in tracker.trace.events if event >= 0]
        assert sizes.count(4 * B * H * T * R) == 1


@pytest.mark.parametrize("way", [Tensor.backward, lambda y, gradient: torch.autograd.backward([y], [gradient])])
def test_a_backward_pass_from_a_given_gradient_makes_none_of_its_own(way, monkeypatch):
    with imitated_cuda():
        y, gradient = torch.ones(64, requires_grad=True) * 2, torch.ones(64)
        monkeypatch.setattr(torch, "ones_like", None)  # as which it would begin
        way(y, gradient)


def test_where_only_products_are_allowed_masked_attention_holds_all_scores():
    with imitated_cuda(), sdpa_kernel([SDPBackend.MATH]):
        _, _, kept = masked_attention()
    assert kept >= 2 * B * H * T * (P + S)


def test_autocast_casts_the_operands_of_masked_attention():
    with imitated_cuda(), torch.autocast("cpu", torch.float16):
        q, mask = torch.ones(B, H, T, R), torch.ones(B, 1, T, T, dtype=torch.bool)
        assert F.scaled_dot_product_attention(q, q, q, mask).dtype == torch.float16
