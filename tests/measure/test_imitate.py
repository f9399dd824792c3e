import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from phase1.measure import imitate
from phase1.measure.imitate import imitated_cuda
from phase1.measure.tracker import MemoryTracker


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
