import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from phase1.config import EngineShape
from phase1.measure.memory.trace import PARTS, measured_timeline
from phase1.measure.memory.tracker import MemoryTracker, site_of
from phase1.measure.workload import make_workload, optimizer_tensors, random_batch
from phase1.ops.cross_entropy import chunked
from phase1.ops.cross_entropy.rows import softmax_rows_reference
from phase1.roster import ROLES, model_config
from phase1.training.step import train_step

V = 1000
SMALL = EngineShape(
    vocab_size=3000, d_model=64, n_layers=2, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=16, htt_rank=4, htt_dense_rows=256,
    htt_groups=64,
)  # fmt: skip


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


def live(tracker):
    """Bytes alive now, by part, those of 0 left out."""
    blocks = [tracker.trace.blocks[index] for index in tracker.live()]
    return {part: total for part in PARTS if (total := sum(block.size for block in blocks if block.part == part))}


def test_the_bytes_of_a_known_graph_are_exact(tracker):
    weight = torch.ones(256, 128, requires_grad=True)  # 128 KiB
    tracker.label([weight], "parameters", "weight")
    assert live(tracker) == {"parameters": 131072}
    tracker.mark("start")
    x = torch.ones(64, 256)  # 64 KiB
    y = x @ weight  # 32 KiB, x is saved
    z = y * y  # 32 KiB, y is saved
    loss = z.sum()
    del y, x
    assert live(tracker) == {"parameters": 131072, "activations": 65536 + 2 * 32768 + 4}
    del z
    assert live(tracker)["activations"] == 65536 + 32768 + 4
    tracker.mark("forward")
    loss.backward()
    tracker.mark("backward")
    tracker.label([weight.grad], "gradients", "weight")
    assert live(tracker) == {"parameters": 131072, "gradients": 131072, "activations": 4}
    timeline = measured_timeline(tracker.trace, 0)
    assert timeline.phase_peaks["forward"] == 131072 + 65536 + 2 * 32768 + 4
    assert timeline.parts_at_peak["gradients"] == 131072  # from its beginning, though it was labelled at the end


def test_views_and_in_place_results_are_counted_once_and_until_the_last_is_gone(tracker):
    x = torch.ones(10, 100)
    halves = x.view(20, 50).split(10)
    x.add_(1)
    assert live(tracker) == {"temporary": 4000}
    del x
    assert live(tracker) == {"temporary": 4000}
    del halves
    assert live(tracker) == {}


def test_a_trace_is_of_the_last_step_with_the_phases_it_had(tracker):
    kept = torch.ones(7)
    for size in (5000, 1000):
        tracker.mark("start")
        tensor = torch.ones(size)
        del tensor
        tracker.mark("forward")
        tensor = torch.ones(2 * size)
        tracker.mark("backward")
        del tensor
        tracker.mark("optimizer")
    assert tracker.trace.begins == {"forward": 0, "backward": 2, "optimizer": 3}
    assert [tracker.trace.blocks[index].size for index in tracker.trace.resident] == [28]
    timeline = measured_timeline(tracker.trace, 0)
    assert timeline.phase_peaks == {"forward": 4028, "backward": 8028, "optimizer": 8028}  # which begins with the tensor
    assert kept.numel() == 7


def test_a_tensor_as_wide_as_the_vocabulary_is_logits_unless_it_is_labelled(tracker):
    tracker.mark("start")
    logits, table, vector = torch.ones(4, V), torch.ones(3, V), torch.ones(V)
    tracker.label([table], "parameters", "table")
    assert live(tracker) == {"parameters": 12000, "activations": 4000, "logits_loss": 16000}
    del logits, table, vector


class Blocks(torch.nn.Module):
    """Two layers in the names and the order of a language model, recomputed in the backward pass."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"mixer": torch.nn.Linear(64, 64, bias=False), "mlp": torch.nn.Linear(64, 64, bias=False)})
            for _ in range(2)
        )

    def loss(self, x):
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block["mlp"](block["mixer"](x).sin()).exp(), x, use_reentrant=False)
        return x.sum()


def step(tracker, model, x):
    tracker.mark("start")
    loss = model.loss(x)
    tracker.mark("forward")
    loss.backward()
    tracker.mark("backward")
    for parameter in model.parameters():
        parameter.grad = None
    tracker.mark("optimizer")


def test_what_a_block_recomputes_belongs_to_it_and_gradients_to_the_module_of_their_parameter(tracker):
    model, x = Blocks(), torch.ones(128, 64, requires_grad=True)
    tracker.watch(model)
    step(tracker, model, x)
    backward = [tracker.trace.blocks[event] for event in tracker.trace.events if event >= tracker.trace.events[tracker.trace.begins["backward"]]]
    recomputed = {block.module for block in backward if block.size == 128 * 64 * 4}
    assert {"blocks.0.mixer", "blocks.1.mixer"} <= recomputed
    gradients = [block for block in tracker.trace.blocks if block.part == "gradients"]
    assert sorted(block.module for block in gradients) == ["blocks.0.mixer", "blocks.0.mlp", "blocks.1.mixer", "blocks.1.mlp"]
    assert {block.size for block in gradients} == {64 * 64 * 4}


def test_watching_modules_changes_no_allocation_and_leaves_no_hook_behind():
    def sizes(watched):
        model, x = Blocks(), torch.ones(128, 64, requires_grad=True)
        with MemoryTracker(V, "cpu") as tracker:
            tracker.watch(model) if watched else tracker.label(model.parameters(), "parameters", "")
            step(tracker, model, x)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        first = tracker.trace.resident[-1] + 1
        return [(tracker.trace.blocks[e].size if e >= 0 else ~tracker.trace.blocks[~e].size) for e in tracker.trace.events if max(e, ~e) >= first]

    assert sizes(watched=True) == sizes(watched=False)


def test_modules_are_named_as_deep_as_the_mixer_of_a_block():
    names = ["blocks.3.mixer.rank_gate.out_proj.bias", "blocks.3.mlp_norm.weight", "blocks.3.x", "embedding.parts.0.basis", "norm.weight"]
    assert [site_of(name) for name in names] == ["blocks.3.mixer", "blocks.3.mlp_norm", "blocks.3", "embedding", "norm"]


def allocators_peak(run):
    """What `run()` has alive at most beyond what was before it, as PyTorch's CPU allocator reports it to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("role", ROLES)
def test_a_tracked_training_step_takes_the_memory_that_the_allocator_counts_for_an_untracked_one(role, monkeypatch):
    """Real tensors, no fakes, with the exceptions by which checkpointing ends its recomputation."""
    monkeypatch.setattr(chunked, "softmax_rows", softmax_rows_reference)  # as one operator it has temporaries, on a CPU
    torch.use_deterministic_algorithms(False)
    state, batch = make_workload(model_config(role, SMALL), "cpu"), random_batch(SMALL.vocab_size, 2, 256, "cpu")
    for group in state.optimizer.param_groups:
        group.update(fused=True, foreach=False)
    train_step(state, [batch])
    expected = allocators_peak(lambda: train_step(state, [batch]))
    with MemoryTracker(SMALL.vocab_size, "cpu") as tracker:
        tracker.watch(state.model)
        tracker.label([*optimizer_tensors(state), *batch], "optimizer_state", "")
        train_step(state, [batch], tracker.mark)
    totals = measured_timeline(tracker.trace, 0).totals
    assert max(totals) - totals[0] == pytest.approx(expected, rel=1e-3)  # kernels have a few KB of scratch


def test_two_gradients_are_summed_in_place_as_they_are_when_nobody_watches():
    torch.use_deterministic_algorithms(False)
    x = torch.ones(1 << 20, requires_grad=True)

    def backward(mark=lambda name: None):
        x.grad = None
        mark("start")
        y = x * 1.0
        loss = (y * 2).sum() + (y * 3).sum()
        del y
        mark("forward")
        loss.backward()  # the gradient of y * 2, that of y * 3, and no third tensor for their sum
        mark("backward")

    expected = allocators_peak(backward)
    with MemoryTracker(V, "cpu") as tracker:
        backward(tracker.mark)
    timeline = measured_timeline(tracker.trace, 0)
    assert max(timeline.totals) == pytest.approx(expected, abs=64)  # a few scalars
    assert timeline.phase_peaks["backward"] == pytest.approx(2 * 4 * x.numel(), abs=64)


def test_gradients_that_something_else_holds_are_summed_apart():
    torch.use_deterministic_algorithms(False)
    x, q = (torch.ones(1000, requires_grad=True) for _ in range(2))
    with MemoryTracker(V, "cpu") as tracker:
        tracker.mark("start")
        p = q.exp()
        a = x * 1.0
        s = a.sin()
        loss = ((a + p) * 2).sum() + s.sum()  # the gradient of a + p is that of a and, later, that of p
        tracker.mark("forward")
        loss.backward()
        seen = [x.grad[0].item(), q.grad[0].item()]
    assert seen == pytest.approx([2 + math.cos(1), 2 * math.e])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_tensors_that_end_together_end_in_one_order_whatever_theirs_was(order):
    with MemoryTracker(V, "cpu") as tracker:
        tracker.mark("start")
        held = {i: torch.ones(10 + i) for i in range(3)}
        tracker.mark("forward")
        late = torch.ones(5)
        for i in order:
            del held[i]
        del late
    assert tracker.trace.events == [0, 1, 2, 3, ~0, ~1, ~2, ~3]


class Counted:
    """`OperatorMemory` of a device whose every product keeps 100 bytes, and whose every operator has 7 of scratch."""

    def before(self, func, phase):
        return 100 if func is torch.ops.aten.mm.default else 0

    def after(self, func, args):
        return 7, 3


def test_workspaces_scratch_and_rounding_come_from_outside_the_operators_results():
    x = torch.ones(8, 8)
    with MemoryTracker(V, "cpu", Counted()) as tracker:
        y = x @ x  # not in a step
        tracker.mark("start")
        y = x @ x
    trace = tracker.trace
    assert [trace.blocks[event].part for event in trace.events if event >= 0] == ["workspace", "activations", "temporary"]
    assert [trace.blocks[event].size for event in trace.events if event >= 0] == [100, 256, 7]
    assert trace.events[2:4] == [trace.events[2], ~trace.events[2]]
    assert trace.rounding == [(4, 3)]
    assert y.shape == (8, 8)


def test_tensors_of_another_device_are_not_counted():
    with MemoryTracker(V, "cuda") as tracker:
        tensor = torch.ones(1000)
        assert tracker.label([tensor], "parameters", "") == []
    assert tracker.live() == []
