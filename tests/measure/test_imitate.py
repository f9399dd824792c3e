import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from phase1.measure.imitate import imitated_cuda
from phase1.measure.tracker import MemoryTracker


def test_tensors_of_any_size_take_no_memory_and_questions_have_an_answer():
    with imitated_cuda():
        x = torch.ones(1 << 40)
        assert x.shape == (1 << 40,)
        assert x.sum().item() == 0
        assert torch.equal(x, x)


@pytest.mark.parametrize("function", [torch.exp, F.softplus, torch.sum, lambda x: x.cumsum(0), lambda x: F.rms_norm(x, (8,))])
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
        before = tracker.live.total
        y = F.rms_norm(x, (1024,), weight)
        assert tracker.live.total - before == 64 * 1024 * 4 + 512
        y.sum().backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
