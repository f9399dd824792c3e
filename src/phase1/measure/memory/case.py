"""A model at one size, and the memory that a training step of it takes."""

from dataclasses import dataclass, field
from typing import Literal

from phase1.config import ModelConfig, Optimizer, TrainConfig
from phase1.machine.cards import Chip
from phase1.measure.memory.trace import Timeline, downsampled
from phase1.records.schema import Execution, MemoryTimeline

TIMELINE_POINTS = 100


@dataclass(frozen=True)
class MemoryCase:
    """One model at one size, on a card of which a process may have `vram_limit_bytes`, or all; a `dry_run` is estimated."""

    model: ModelConfig
    batch_size: int
    seq_length: int
    vram_limit_bytes: int | None = None
    dry_run: bool = False
    compiled: bool = False  # the loss; of no effect on an estimate
    chip: Chip | None = None  # the chip that an estimate is for
    piece_length: int | None = None  # tokens of a sequence at a time; None: whole sequences
    optimizer: Optimizer = TrainConfig.optimizer
    ranks: int = 1  # each of which takes such a step


@dataclass(frozen=True)
class MemoryPeaks:
    """What one case took; all fields as in `MemoryResult`."""

    basis: Literal["measured", "estimated"]
    parameters: dict[str, int]
    phase_bytes: dict[str, int]
    peak_reserved_bytes: int
    outside_allocator_bytes: int
    breakdown: dict[str, int] = field(default_factory=dict)
    top_modules: dict[str, int] = field(default_factory=dict)
    timeline: MemoryTimeline | None = None
    assumptions: str | None = None
    ran: Execution | None = None

    @property
    def peak_allocated_bytes(self) -> int:
        return max(self.phase_bytes.values())

    @property
    def needed_bytes(self) -> int:
        """Bytes of the card that a step needs, which decide whether it fits."""
        return self.peak_reserved_bytes + self.outside_allocator_bytes

    @property
    def unattributed_bytes(self) -> int | None:
        """What the parts, none of them derived from the peak, leave of it; negative where they are more, None without parts."""
        return self.peak_allocated_bytes - sum(self.breakdown.values()) if self.breakdown else None


def timeline_record(timeline: Timeline) -> MemoryTimeline:
    """`timeline` at TIMELINE_POINTS instants, that of the peak among them."""
    at, parts = downsampled(timeline, TIMELINE_POINTS)
    begins = {name: rows.start for name, rows in timeline.phases.items()}
    return MemoryTimeline(events=len(timeline.rows) - 1, phase_begins=begins, at=at, parts=dict(parts))
