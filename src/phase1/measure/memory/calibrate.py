"""How far estimates of peak memory are from what a GPU takes, over many configurations."""

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from phase1.config import EngineShape, present_settings
from phase1.machine.isolate import run_isolated
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.measure.memory.measured import chip_of, measure_memory
from phase1.roster import model_config

MEDIAN_LIMIT, WORST_LIMIT = 2.0, 5.0  # percent of the measured peak
LEAST_CASES = 24

# for a role and sizes of a model, with changes of it by the names that records have for them: (B, T)
_SIZES: dict[str, dict[str, Any]] = {
    "D512 L8": {},
    "D256 L4": {"d_model": 256, "n_layers": 4, "n_heads": 4},
    "D768 L12": {"d_model": 768, "n_layers": 12, "n_heads": 12},
    "D1024 L6": {"d_model": 1024, "n_layers": 6, "n_heads": 16},
    "D512 L8 V32000": {"vocab_size": 32000},
}
_CASES: tuple[tuple[str, str, dict[str, Any], tuple[tuple[int, int], ...]], ...] = (
    ("baseline", "D512 L8", {}, ((4, 2048), (1, 512), (2, 1024), (3, 1000))),
    ("baseline_optimized", "D512 L8", {}, ((4, 2048), (2, 4096), (5, 777))),
    ("phase1", "D512 L8", {}, ((4, 2048), (1, 512), (8, 1024), (3, 1000), (2, 4096))),
    ("baseline", "D256 L4", {}, ((4, 1024),)),
    ("baseline_optimized", "D256 L4", {}, ((8, 512),)),
    ("phase1", "D256 L4", {}, ((4, 1024), (7, 333))),
    ("baseline", "D768 L12", {}, ((2, 1024),)),
    ("phase1", "D768 L12", {}, ((2, 1024),)),
    ("baseline", "D1024 L6", {}, ((2, 1024),)),
    ("phase1", "D1024 L6", {}, ((2, 1024),)),
    ("baseline", "D512 L8 V32000", {}, ((2, 1024),)),
    ("phase1", "D512 L8 V32000", {}, ((2, 1024),)),
    ("baseline", "D512 L8", {"checkpointing": True}, ((4, 1024),)),
    ("baseline", "D512 L8", {"loss": "chunked"}, ((4, 1024),)),
    ("phase1", "D512 L8", {"checkpointing": False}, ((2, 1024), (3, 777))),
    ("phase1", "D512 L8", {"loss": "materialized"}, ((2, 1024),)),
    ("phase1", "D512 L8", {"embedding": "dense"}, ((2, 1024),)),
    ("phase1", "D512 L8", {"mixer": "attention"}, ((2, 1024),)),
    ("phase1", "D512 L8", {"ar_ssm_max_rank": 64, "htt_rank": 32}, ((2, 1024),)),
)


@dataclass(frozen=True)
class CalibrationRow:
    """One configuration. Errors are 100 (estimated / measured - 1), None where the GPU gave no peak (`detail` says why).

    The peaks of the phases (forward, backward, optimizer) and the parts at the highest, in bytes, tell where an error is.
    """

    name: str
    detail: str = ""
    measured_bytes: int | None = None
    estimated_bytes: int | None = None
    error_percent: float | None = None
    reserved_error_percent: float | None = None
    unattributed_percent: float | None = None  # of the measured peak, in no part of its breakdown
    measured_phase_bytes: dict[str, int] = field(default_factory=dict)
    estimated_phase_bytes: dict[str, int] = field(default_factory=dict)
    measured_breakdown: dict[str, int] = field(default_factory=dict)
    estimated_breakdown: dict[str, int] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str | None:
        """The phase of the measured peak, and after it that of the estimated one where it is another."""
        both = (self.measured_phase_bytes, self.estimated_phase_bytes)
        return ", estimated ".join(dict.fromkeys(max(peaks, key=peaks.__getitem__) for peaks in both if peaks)) or None


@dataclass(frozen=True)
class Calibration:
    """All rows, and the verdict on the peaks of allocated memory."""

    rows: list[CalibrationRow]
    median_percent: float | None
    worst_percent: float | None
    verdict: Literal["pass", "fail", "inconclusive"]

    def as_json(self) -> dict[str, Any]:
        limits = {"median_limit_percent": MEDIAN_LIMIT, "worst_limit_percent": WORST_LIMIT, "least_cases": LEAST_CASES}
        return asdict(self) | limits


def calibration_cases() -> dict[str, MemoryCase]:
    """Both models and what is between them, at sizes small and large, round and odd, by name."""
    cases = {}
    for role, size, changes, shapes in _CASES:
        model = model_config(role, EngineShape(**_SIZES[size]), **present_settings(changes))
        words = [role, size, *(f"{name}={value}" for name, value in changes.items())]
        for batch_size, seq_length in shapes:
            cases[" ".join([*words, f"B{batch_size} T{seq_length}"])] = MemoryCase(model, batch_size, seq_length)
    return cases


def calibrate(cases: dict[str, MemoryCase], workers: int) -> Iterator[CalibrationRow]:
    """Measure every case in a fresh process, `workers` at a time on the one GPU, and estimate it meanwhile.

    The allocator counts by process, so neighbours do not change its peaks; memory outside it is not compared.
    """
    with ThreadPoolExecutor(workers) as pool:
        running = {name: pool.submit(run_isolated, measure_memory, case) for name, case in cases.items()}
        for name, case in cases.items():
            estimated = estimate_memory(case, chip_of(case))
            outcome = running[name].result()
            if outcome.value is None:
                yield CalibrationRow(name, f"{outcome.status}: {outcome.message}")
                continue
            measured = outcome.value
            peak = measured.peak_allocated_bytes
            yield CalibrationRow(
                name,
                measured_bytes=peak,
                estimated_bytes=estimated.peak_allocated_bytes,
                error_percent=100 * (estimated.peak_allocated_bytes / peak - 1),
                reserved_error_percent=100 * (estimated.peak_reserved_bytes / measured.peak_reserved_bytes - 1),
                unattributed_percent=None if measured.unattributed_bytes is None else 100 * measured.unattributed_bytes / peak,
                measured_phase_bytes=measured.phase_bytes,
                estimated_phase_bytes=estimated.phase_bytes,
                measured_breakdown=measured.breakdown,
                estimated_breakdown=estimated.breakdown,
            )


def judge(rows: list[CalibrationRow]) -> Calibration:
    """Pass where median and worst absolute error are within the limits, over LEAST_CASES rows at least."""
    errors = [abs(row.error_percent) for row in rows if row.error_percent is not None]
    if not errors:
        return Calibration(rows, None, None, "inconclusive")
    median, worst = statistics.median(errors), max(errors)
    within = median <= MEDIAN_LIMIT and worst <= WORST_LIMIT
    verdict: Literal["pass", "fail", "inconclusive"] = "pass" if within else "fail"
    if within and len(errors) < LEAST_CASES:
        verdict = "inconclusive"
    return Calibration(rows, median, worst, verdict)
