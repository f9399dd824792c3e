"""A step written by hand: which bytes are alive when, and whose they are."""

import pytest

from phase1.measure.memory.estimate.allocator import MIB
from phase1.measure.memory.estimate.simulate import simulated_timeline
from phase1.measure.memory.trace import PARTS, MemoryBlock, Timeline, Trace, downsampled, measured_timeline

WEIGHT, STATE, ACTIVATION, WORKSPACE, GRADIENT, SCRATCH, LOSS = range(7)


@pytest.fixture
def trace():
    return Trace(
        blocks=[
            MemoryBlock(3 * MIB, "parameters", "table"),
            MemoryBlock(6 * MIB, "optimizer_state", "(optimizer)"),
            MemoryBlock(5 * MIB, "activations", "blocks.0"),
            MemoryBlock(8 * MIB, "workspace", "(forward)"),
            MemoryBlock(3 * MIB, "gradients", "table"),
            MemoryBlock(MIB, "temporary", "(optimizer)"),
            MemoryBlock(4, "activations", "(forward)"),
        ],
        resident=[WEIGHT, STATE],
        events=[WORKSPACE, ACTIVATION, LOSS, GRADIENT, ~ACTIVATION, SCRATCH, ~SCRATCH, ~GRADIENT],
        begins={"forward": 0, "backward": 3, "optimizer": 5},
    )


def test_a_phase_is_its_events(trace):
    assert [trace.phase(name) for name in trace.begins] == [range(0, 3), range(3, 5), range(5, 8)]


def test_a_simulated_step_has_the_state_the_workspace_and_the_rounding_of_the_steps_before(trace):
    timeline, reserved = simulated_timeline(trace, [WEIGHT], warmup_steps=2)
    start = dict(zip(PARTS, timeline.rows[0]))
    assert (start["parameters"], start["optimizer_state"], start["workspace"]) == (3 * MIB, 6 * MIB, 8 * MIB)
    assert start["activations"] == start["gradients"] == 0
    parts = timeline.parts_at_peak
    assert timeline.peak == 4 and parts["gradients"] == 3 * MIB and parts["activations"] == 5 * MIB + 4
    assert parts["rounding"] >= 512 - 4 and sum(parts.values()) == max(timeline.totals)
    assert timeline.phase_peaks["forward"] < timeline.phase_peaks["backward"] == max(timeline.totals)
    assert timeline.phase_peaks["optimizer"] == timeline.totals[6]
    assert reserved >= max(timeline.totals) and reserved % (2 * MIB) == 0


def test_a_result_that_outlives_its_step_does_not_pile_up(trace):
    once, often = (simulated_timeline(trace, [WEIGHT], warmup_steps=n)[0].totals for n in (1, 20))
    assert once == often


def test_optimizer_state_is_made_after_the_first_backward_pass_and_may_take_the_place_of_an_activation(trace):
    trace.blocks[STATE].size = 5 * MIB
    _, late = simulated_timeline(trace, [WEIGHT], warmup_steps=0)  # 3 + 8 + 5 + 3 MiB in one segment, the 5 used twice
    _, early = simulated_timeline(trace, [WEIGHT, STATE], warmup_steps=0)
    assert (late, early) == (22 * MIB, 42 * MIB)


def test_a_measured_step_has_the_workspace_and_rounding_that_were_counted(trace):
    trace.events = [event for event in trace.events if event != WORKSPACE]
    trace.begins = {"forward": 0, "backward": 2, "optimizer": 4}
    trace.rounding = [(1, 100), (3, 700), (6, 50)]  # after the activation; after the gradient; after the scratch
    timeline = measured_timeline(trace, workspace=9 * MIB)
    assert [row[PARTS.index("rounding")] for row in timeline.rows] == [100, 100, 700, 700, 50, 50, 50, 50]
    assert {row[PARTS.index("workspace")] for row in timeline.rows} == {9 * MIB}
    assert timeline.peak == 3
    assert timeline.parts_at_peak == dict.fromkeys(PARTS, 0) | {
        "parameters": 3 * MIB, "optimizer_state": 6 * MIB, "activations": 5 * MIB + 4, "gradients": 3 * MIB,
        "workspace": 9 * MIB, "rounding": 700,
    }  # fmt: skip


def test_the_top_modules_are_those_with_the_most_bytes_alive_at_the_peak(trace):
    timeline = measured_timeline(trace, workspace=0)
    assert list(timeline.top_modules.items()) == [
        ("(forward)", 8 * MIB + 4), ("(optimizer)", 6 * MIB), ("table", 6 * MIB), ("blocks.0", 5 * MIB),
    ]  # fmt: skip


@pytest.mark.parametrize("points", [1, 7, 200])
def test_downsampling_keeps_the_peak_and_the_order(points):
    rows = [[value, 0, 0, 0, 0, 0, 0, 0, 1] for value in [3, 9, 2, 50, 4, 8, 1, 7, 6, 5] * 3]
    timeline = Timeline(rows, {}, {})
    at, parts = downsampled(timeline, points)
    assert len(at) == min(points, len(rows)) and at == sorted(at)
    assert timeline.peak in at and max(parts["parameters"]) == 50
    assert all(rows[i][0] == value for i, value in zip(at, parts["parameters"]))
