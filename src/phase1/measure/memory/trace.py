"""The allocations and frees of a training step, in order, and the memory over time that follows from them."""

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

Part = Literal[
    "parameters", "buffers", "gradients", "optimizer_state", "activations", "logits_loss", "temporary", "workspace", "rounding",
]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)
PHASES = ("forward", "backward", "optimizer")
TOP_MODULES = 10


@dataclass
class MemoryBlock:
    """One piece of memory: the bytes asked for, what they are for, and the module that asked."""

    size: int
    part: Part
    module: str


@dataclass
class Trace:
    """The blocks of one step. Event i >= 0 allocates block i, event ~i frees it."""

    blocks: list[MemoryBlock] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)  # alive when the step began, oldest first
    events: list[int] = field(default_factory=list)
    begins: dict[str, int] = field(default_factory=dict)  # events before each phase
    rounding: list[tuple[int, int]] = field(default_factory=list)  # measured: events before it, allocated - requested bytes

    def phase(self, name: str) -> range:
        """Indices of the events of a phase."""
        later = [self.begins[other] for other in PHASES[PHASES.index(name) + 1 :] if other in self.begins]
        return range(self.begins[name], min(later, default=len(self.events)))


@dataclass(frozen=True)
class Timeline:
    """Live bytes by part, in the order of PARTS: `rows[0]` before the step, `rows[i + 1]` after event i."""

    rows: list[list[int]]
    phases: dict[str, range]  # rows of each phase: the state it begins with, and that after each of its events
    top_modules: dict[str, int]  # bytes alive at the peak by module, largest first

    @cached_property
    def totals(self) -> list[int]:
        return [sum(row) for row in self.rows]

    @cached_property
    def peak(self) -> int:
        """The row of most bytes, the first of equals."""
        return self.totals.index(max(self.totals))

    @property
    def parts_at_peak(self) -> dict[str, int]:
        return dict(zip(PARTS, self.rows[self.peak], strict=True))

    @property
    def phase_peaks(self) -> dict[str, int]:
        """The most bytes alive in each phase, the moment before it included."""
        return {name: max(self.totals[i] for i in rows) for name, rows in self.phases.items()}


def measured_timeline(trace: Trace, workspace: int) -> Timeline:
    """The timeline of a step on a GPU: its blocks, the rounding that the allocator counted, and a constant workspace."""
    counted = [events for events, _ in trace.rounding]
    rows = []
    for index, parts in enumerate(live_parts(trace)):
        sample = min(bisect.bisect_left(counted, index), len(counted) - 1)  # of the operator that this event is part of
        parts[PARTS.index("workspace")] += workspace
        parts[PARTS.index("rounding")] = trace.rounding[sample][1] if counted else 0
        rows.append(parts)
    return timeline_of(trace, rows)


def live_parts(trace: Trace, without: set[int] | None = None) -> Iterator[list[int]]:
    """Requested bytes by part before the first event and after each; not those of the blocks `without`."""
    index = {part: i for i, part in enumerate(PARTS)}
    parts = [0] * len(PARTS)
    for old in (trace.blocks[number] for number in trace.resident):
        parts[index[old.part]] += old.size
    yield parts.copy()
    for event in trace.events:
        number = event if event >= 0 else ~event
        if without is None or number not in without:
            made = trace.blocks[number]
            parts[index[made.part]] += made.size if event >= 0 else -made.size
        yield parts.copy()


def timeline_of(trace: Trace, rows: list[list[int]]) -> Timeline:
    """The timeline of `rows`, bytes by part after every event, with its phases and the largest modules at its peak."""
    phases = {name: range(span.start, span.stop + 1) for name in trace.begins for span in [trace.phase(name)]}
    timeline = Timeline(rows, phases, {})
    return Timeline(rows, phases, _top_modules(trace, timeline.peak))


def _top_modules(trace: Trace, events: int) -> dict[str, int]:
    """Requested bytes by module after the first `events` events, the largest TOP_MODULES first."""
    alive = set(trace.resident)
    for event in trace.events[:events]:
        if event >= 0:
            alive.add(event)
        else:
            alive.discard(~event)
    bytes_of: dict[str, int] = {}
    for number in alive:
        block = trace.blocks[number]
        bytes_of[block.module] = bytes_of.get(block.module, 0) + block.size
    return dict(sorted(bytes_of.items(), key=lambda item: (-item[1], item[0]))[:TOP_MODULES])


def downsampled(timeline: Timeline, points: int) -> tuple[list[int], Mapping[str, list[int]]]:
    """The largest row of each of at most `points` equal intervals, the peak among them: indices, and bytes by part."""
    totals, count = timeline.totals, len(timeline.rows)
    intervals = min(points, count)
    cuts = [count * i // intervals for i in range(intervals + 1)]
    chosen = [max(range(start, end), key=lambda i: totals[i]) for start, end in zip(cuts, cuts[1:])]
    return chosen, {part: [timeline.rows[i][column] for i in chosen] for column, part in enumerate(PARTS)}
