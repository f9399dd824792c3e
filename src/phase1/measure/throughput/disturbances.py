"""Warnings about step times (throttling, clocks, other programs, unstable or host-bound steps), with advice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from phase1.records.schema import Measurement
from phase1.stats.curves import FLAT_EXPONENT
from phase1.stats.step_times import UNSTABLE, drifts, spread

# Bits of NVML's clocks_event_reasons (nvml.h). Idle, clocks set by the user and display clocks slow nothing down.
THERMAL: Final = 0x20 | 0x40
BRAKE: Final = 0x08 | 0x80
POWER_CAP: Final = 0x04

CLOCK_CHANGE = 0.03  # relative change of the SM clock, from the first to the last tenth of the samples
FOREIGN_CPU = 0.10  # share of all cores that other programs use
DRIFT = 0.05  # relative change of the median, from the first to the second half of the steps of one length
LAUNCH_SHARE = 0.90  # launch time as a share of the step; above it the device waits for the host


@dataclass(frozen=True)
class GpuSample:
    """What the driver reported while a step ran; None for what it does not report."""

    sm_clock_mhz: int | None = None
    throttling: int | None = None  # NVML's bits
    processes: int | None = None  # programs that compute on the GPU, this one included


@dataclass(frozen=True)
class CpuUse:
    """Processor seconds between two moments: of all programs, and of this one."""

    seconds: float  # wall clock
    busy_seconds: float
    own_seconds: float
    cores: int


def run_warnings(samples: Sequence[GpuSample], cpu: CpuUse | None) -> list[str]:
    """Warnings about the whole run. `samples` are in the order of time; empty for a run on the CPU."""
    return [*_throttling(samples), *_clock(samples), *_other_programs(samples), *_busy_cpu(cpu), *_unwatched(samples)]


def _throttling(samples: Sequence[GpuSample]) -> list[str]:
    known = [s.throttling for s in samples if s.throttling is not None]
    advice = {
        THERMAL: "the GPU was too hot and lowered its clock in {} of the samples: cool it better, or set a lower power limit",
        BRAKE: "the board's power brake lowered the GPU's clock in {} of the samples: check the power supply and its cables",
        POWER_CAP: "the power limit held the GPU's clock down in {} of the samples, usual for a card under full load: compare "
        "only runs at the same limit",
    }
    shares = {bits: sum(bool(reasons & bits) for reasons in known) / max(len(known), 1) for bits in advice}
    return [text.format(f"{shares[bits]:.0%}") for bits, text in advice.items() if shares[bits] >= 0.01]


def _clock(samples: Sequence[GpuSample]) -> list[str]:
    clocks = [s.sm_clock_mhz for s in samples if s.sm_clock_mhz]
    if len(clocks) < 2:
        return []
    few = max(len(clocks) // 10, 1)
    first, last = float(np.median(clocks[:few])), float(np.median(clocks[-few:]))
    if abs(last / first - 1) <= CLOCK_CHANGE:
        return []
    return [
        f"the SM clock went from {first:.0f} to {last:.0f} MHz during the run ({last / first - 1:+.0%}): ratios to the "
        "baseline hold, comparisons of lengths and of runs suffer; raise --warmup-steps, or lock the clock (nvidia-smi -lgc)"
    ]


def _other_programs(samples: Sequence[GpuSample]) -> list[str]:
    others = max((s.processes - 1 for s in samples if s.processes), default=0)
    if others < 1:
        return []
    return [f"other programs held this GPU, up to {others}: stop them (nvidia-smi lists them) and measure again"]


def _busy_cpu(cpu: CpuUse | None) -> list[str]:
    if cpu is None or cpu.seconds <= 0:
        return []
    others = (cpu.busy_seconds - cpu.own_seconds) / cpu.seconds
    if others <= FOREIGN_CPU * cpu.cores:
        return []
    return [f"other programs kept {others:.1f} of {cpu.cores} CPU cores busy: stop them and measure again"]


def _unwatched(samples: Sequence[GpuSample]) -> list[str]:
    if not samples or any(s != GpuSample() for s in samples):
        return []
    return ["the driver could not be asked, so throttling, clocks and other programs went unwatched: pip install nvidia-ml-py"]


def model_warnings(measurements: Sequence[Measurement], device: str) -> list[str]:
    """Warnings about the times of one model, shortest length first."""
    done = sorted((m for m in measurements if m.status == "ok"), key=lambda m: m.seq_length)
    warnings = []
    if unstable := [f"{m.seq_length:,} ({share:.0%})" for m in done if (share := spread(m.step_times_ms)) > UNSTABLE]:
        warnings.append(
            f"unstable steps at T = {', '.join(unstable)}: the middle half of them spreads over that share of the median; "
            "measure on an idle machine, or raise --measure-steps"
        )
    if drifting := [f"{m.seq_length:,} ({change:+.0%})" for m in done if (change := drifts(m.step_times_ms, DRIFT))]:
        warnings.append(
            f"steps drift at T = {', '.join(drifting)}, first to second half: raise --warmup-steps, lock the clock and stop "
            "other programs; ratios to the baseline are taken round by round and suffer less"
        )
    for sentence in dict.fromkeys(text for m in done if m.ran for text in m.ran.otherwise):
        warnings.append(f"otherwise than asked: {sentence}")
    if device == "cuda" and (bound := host_bound(done)):
        warnings.append(
            f"host-bound at T = {', '.join(f'{length:,}' for length in bound)}: the GPU waits for the host to launch "
            "operators, so these times are the host's; use --cuda-graphs, --compile, larger --batch-size or --seq-lengths"
        )
    return warnings


def host_bound(done: Sequence[Measurement]) -> list[int]:
    """Lengths whose step lasts as long as its launch, and hardly longer than that of a neighbouring length.

    Both are needed: a host far ahead of the device has to wait too, when the queue of launches is full. Without launch times
    (older records), growth alone.
    """
    bound = []
    for i, m in enumerate(done):
        assert m.total_time_ms is not None
        launched = m.launch_time_ms is None or m.launch_time_ms >= LAUNCH_SHARE * m.total_time_ms
        if launched and (len(done) == 1 and m.launch_time_ms is not None or _is_flat(done, i)):
            bound.append(m.seq_length)
    return bound


def _is_flat(done: Sequence[Measurement], i: int) -> bool:
    """Whether the step time hardly grows from length i to the next (for the last length: from the one before)."""
    pair = done[i : i + 2] if i + 1 < len(done) else done[i - 1 : i + 1] if i else []
    if len(pair) < 2:
        return False
    (a, b) = pair
    assert a.total_time_ms is not None and b.total_time_ms is not None
    return math.log(b.total_time_ms / a.total_time_ms) < FLAT_EXPONENT * math.log(b.seq_length / a.seq_length)
