import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from phase1.measure.tracker import MemoryTracker

V = 1000


@pytest.fixture(params=["real", "fake"])
def tracker(request):
    torch.use_deterministic_algorithms(False)  # else every empty tensor is filled, through one more operator
    tracker = MemoryTracker(V, "cpu")
    if request.param == "real":
        with tracker:
            yield tracker
    else:
        with FakeTensorMode(), tracker:
            yield tracker


def test_the_bytes_of_a_known_graph_are_exact(tracker):
    weight = torch.ones(256, 128, requires_grad=True)  # 128 KiB
    tracker.label([weight], "parameters")
    assert tracker.live.parts["parameters"] == 131072
    tracker.mark("start")
    x = torch.ones(64, 256)  # 64 KiB
    y = x @ weight  # 32 KiB, x is saved
    z = y * y  # 32 KiB, y is saved
    loss = z.sum()  # 512 B
    del y, x
    assert tracker.live.total == 131072 + 65536 + 2 * 32768 + 512
    del z
    assert tracker.live.parts["activations"] == 65536 + 32768 + 512
    tracker.mark("forward")
    assert tracker.peaks["forward"].total == 131072 + 65536 + 2 * 32768 + 512
    loss.backward()
    tracker.mark("backward")
    tracker.label([weight.grad], "gradients")
    assert tracker.live.parts["gradients"] == 131072
    assert tracker.live.parts["activations"] == 512 and tracker.live.parts["temporary"] <= 512


def test_views_and_in_place_results_are_counted_once_and_until_the_last_is_gone(tracker):
    before = tracker.live.total
    x = torch.ones(10, 100)
    halves = x.view(20, 50).split(10)
    x.add_(1)
    assert tracker.live.total == before + 4096
    del x
    assert tracker.live.total == before + 4096
    del halves
    assert tracker.live.total == before


def test_sizes_are_rounded_up_to_blocks_of_512_bytes(tracker):
    tensors = [torch.ones(n, dtype=torch.uint8) for n in (1, 512, 513)]
    assert tracker.live.total == 512 + 512 + 1024
    assert len(tensors) == 3


def test_a_peak_is_of_its_phase_and_a_new_step_forgets_it(tracker):
    for size in (5000, 1000):
        tracker.mark("start")
        tensor = torch.ones(size)
        del tensor
        tracker.mark("forward")
        tensor = torch.ones(2 * size)
        tracker.mark("backward")
        del tensor
        tracker.mark("optimizer")
    expected = {"forward": 4096, "backward": 8192, "optimizer": 8192}  # the optimizer phase began with the tensor alive
    assert {phase: peak.total for phase, peak in tracker.peaks.items()} == expected
    assert tracker.peak.total == 8192 and sum(tracker.peak.parts.values()) == 8192


def test_a_tensor_as_wide_as_the_vocabulary_is_logits_unless_it_is_labelled(tracker):
    tracker.mark("start")
    logits, table, vector = torch.ones(4, V), torch.ones(3, V), torch.ones(V)
    tracker.label([table], "parameters")
    assert tracker.live.parts["logits_loss"] == 4 * V * 4 // 512 * 512 + 512
    assert tracker.live.parts["parameters"] == 12288
    assert tracker.live.parts["activations"] == 4096
    del logits, table, vector


def test_gradients_are_labelled_as_they_are_accumulated(tracker):
    layer = torch.nn.Linear(256, 256, bias=False)
    tracker.label(layer.parameters(), "parameters")
    tracker.label_gradients(layer)
    tracker.mark("start")
    loss = layer(torch.ones(2, 256)).sum()
    tracker.mark("forward")
    loss.backward()
    assert tracker.live.parts["gradients"] == 262144
    layer.zero_grad(set_to_none=True)
    assert tracker.live.parts["gradients"] == 0


def test_tensors_of_another_device_are_not_counted():
    with MemoryTracker(V, "cuda") as tracker:
        tensor = torch.ones(1000)
        tracker.label([tensor], "parameters")
    assert tracker.live.total == 0
