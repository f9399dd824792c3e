"""Peak memory of a training step: measured on the GPU in a fresh process, or estimated where there is none."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from phase1.config import ModelConfig
from phase1.measure.imitate import imitated_cuda
from phase1.measure.isolate import Outcome, run_here, run_isolated
from phase1.measure.limit import Basis, basis, cap_memory, within_limit
from phase1.measure.tracker import PARTS, MemoryTracker, Part
from phase1.measure.workload import make_workload, random_batch
from phase1.model import LanguageModel
from phase1.record import MemoryResult, Parameters
from phase1.train import TrainState, train_step

WARMUP_STEPS = 2  # optimizer state exists after the first, the allocator has its blocks after the second
MEASURED_STEPS = 3
PROBE_SECONDS = 900.0  # for a process of six steps: where they take longer the card swaps or hangs, and the other cases wait
PHASES = ("forward", "backward", "optimizer")
ASSUMED_CONTEXT_BYTES = 500_000_000  # of an estimate: CUDA context and libraries take 0.3 to 0.6 GB


@dataclass(frozen=True)
class MemoryCase:
    """One model at one size, on a card of which a process may have `vram_limit_bytes`, or all."""

    model: ModelConfig
    batch_size: int
    seq_length: int
    vram_limit_bytes: int | None = None


@dataclass(frozen=True)
class MemoryPeaks:
    """What one case took. `breakdown` sums to peak_allocated_bytes; all other fields as in `record.MemoryResult`."""

    measured: Literal["measured", "estimated"]
    parameters: dict[str, int]
    phase_bytes: dict[str, int]
    peak_reserved_bytes: int
    outside_allocator_bytes: int
    breakdown: dict[str, int]

    @property
    def peak_allocated_bytes(self) -> int:
        return max(self.phase_bytes.values())

    @property
    def needed_bytes(self) -> int:
        """Of the card: what decides whether a step fits."""
        return self.peak_reserved_bytes + self.outside_allocator_bytes


def memory_result(role: str, case: MemoryCase) -> MemoryResult:
    """The record of `case`: measured in a fresh process where there is a GPU, estimated otherwise."""
    on_gpu = torch.cuda.is_available()
    outcome = run_isolated(measure_memory, case, timeout_s=PROBE_SECONDS) if on_gpu else run_here(estimate_memory, case)
    needed = None if outcome.value is None else outcome.value.needed_bytes
    return as_result(role, case, within_limit(outcome, needed, case.vram_limit_bytes), basis(case.vram_limit_bytes))


def as_result(role: str, case: MemoryCase, outcome: Outcome[MemoryPeaks], measured: Basis) -> MemoryResult:
    """The record of an outcome, whether it is a measurement, out of memory or a failure."""
    common: dict[str, Any] = {
        "model_name": role,
        "config": asdict(case.model),
        "config_id": case.model.config_id,
        "status": outcome.status,
        "measured": measured,
    }
    peaks = outcome.value
    if peaks is None:
        advice = f"; {sizes_to_try(case)}" if outcome.status == "oom" else ""
        return MemoryResult(**common, detail=outcome.message + advice)
    return MemoryResult(
        **common,
        parameters=Parameters(**peaks.parameters),
        peak_allocated_bytes=peaks.peak_allocated_bytes,
        peak_reserved_bytes=peaks.peak_reserved_bytes,
        outside_allocator_bytes=peaks.outside_allocator_bytes,
        peak_forward_bytes=peaks.phase_bytes["forward"],
        peak_backward_bytes=peaks.phase_bytes["backward"],
        peak_optimizer_bytes=peaks.phase_bytes["optimizer"],
        breakdown=peaks.breakdown,
    )


def measure_memory(case: MemoryCase) -> MemoryPeaks:
    """Peaks of whole training steps on the first GPU, as the allocator and the driver count them.

    Call it in a fresh process: the allocator's peaks and the driver's figures are of the process and of the card
    (other programs on the card count as outside the allocator).
    """
    cap_memory(case.model, case.vram_limit_bytes)
    state, batch = make_workload(case.model, "cuda"), _batch(case, "cuda")
    for _ in range(WARMUP_STEPS):
        train_step(state, [batch])
    phase_bytes = dict.fromkeys(PHASES, 0)
    reserved = torch.cuda.max_memory_reserved()

    def mark(name: str) -> None:
        nonlocal reserved
        if name != "start":
            phase_bytes[name] = max(phase_bytes[name], torch.cuda.max_memory_allocated())
            reserved = max(reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    for _ in range(MEASURED_STEPS):
        train_step(state, [batch], mark)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    with MemoryTracker(case.model.vocab_size, "cuda") as tracker:
        parts = _parts_at_peak(tracker, state, batch)
    return MemoryPeaks(
        measured="measured",
        parameters=state.model.parameter_counts(),
        phase_bytes=phase_bytes,
        peak_reserved_bytes=reserved,
        outside_allocator_bytes=outside,
        breakdown=_breakdown(parts, max(phase_bytes.values())),
    )


def estimate_memory(case: MemoryCase) -> MemoryPeaks:
    """Peaks of the same training step on tensors that have sizes and no contents, so no GPU and no memory is needed.

    It imitates the GPU's run (phase1.measure.imitate): FP16 autocast, FP32 gradients, loss scaling, fused AdamW with its
    state. Not in it: scratch space inside operators, cuBLAS workspaces and the allocator's fragmentation (reserved is
    allocated, rounded up to 2 MiB). The memory outside the allocator is assumed, not known.
    """
    with imitated_cuda(), MemoryTracker(case.model.vocab_size, "cpu") as tracker:
        state, batch = make_workload(case.model, "cpu", "fp16", model_class=_FakeModel), _batch(case, "cpu")
        _make_optimizer_state(state)
        parts = _parts_at_peak(tracker, state, batch)
    phase_bytes = {phase: tracker.peaks[phase].total for phase in PHASES}
    peak = max(phase_bytes.values())
    return MemoryPeaks(
        measured="estimated",
        parameters=state.model.parameter_counts(),
        phase_bytes=phase_bytes,
        peak_reserved_bytes=-(-peak // 2**21) * 2**21,
        outside_allocator_bytes=ASSUMED_CONTEXT_BYTES,
        breakdown=_breakdown(parts, peak),
    )


def _make_optimizer_state(state: TrainState) -> None:
    """What the warm-up steps leave behind, at the price of none."""
    for group in state.optimizer.param_groups:
        group.update(fused=True, foreach=False)  # as on CUDA; the CPU's default loop makes temporaries
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


class _FakeModel(LanguageModel):
    """Fake parameters cannot be moved, not even to the device they are on."""

    def to(self, *args: Any, **kwargs: Any) -> "_FakeModel":
        return self


def sizes_to_try(case: MemoryCase) -> str:
    """What to lower when memory runs out, the gentlest first."""
    steps = []
    if case.batch_size > 1:
        steps.append(f"--batch-size {case.batch_size // 2}")
    if case.seq_length > 1:
        steps.append(f"--seq-length {case.seq_length // 2}")
    if not case.model.checkpointing:
        steps.append("gradient checkpointing (leave out --no-gradient-checkpointing)")
    return "try " + ", then ".join(steps or ["a smaller --d-model or --n-layers"])


def _batch(case: MemoryCase, device: str) -> tuple[Tensor, Tensor]:
    return random_batch(case.model.vocab_size, case.batch_size, case.seq_length, device)


def _parts_at_peak(tracker: MemoryTracker, state: TrainState, batch: tuple[Tensor, Tensor]) -> dict[Part, int]:
    """What is alive at the highest instant of one step, under the entered `tracker`."""
    tracker.label(state.model.parameters(), "parameters")
    tracker.label(state.model.buffers(), "buffers")
    tracker.label(optimizer_tensors(state), "optimizer_state")
    tracker.label(batch, "activations")
    tracker.label_gradients(state.model)
    train_step(state, [batch], tracker.mark)
    return tracker.peak.parts


def optimizer_tensors(state: TrainState) -> Iterator[Tensor]:
    """Every tensor the optimizer keeps between steps."""
    for values in state.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def _breakdown(parts: dict[Part, int], peak: int) -> dict[str, int]:
    """`parts` and what they leave of `peak`; negative where following the step made it larger than it is unwatched."""
    known = {str(part): parts[part] for part in PARTS}
    return known | {"unattributed": peak - sum(known.values())}
