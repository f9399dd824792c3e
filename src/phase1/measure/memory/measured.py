"""Peak memory of a training step: measured on the GPU in a fresh process, or estimated where there is none."""

import secrets
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from phase1.advice import smaller
from phase1.machine.cards import Chip
from phase1.machine.isolate import Outcome, run_here, run_isolated
from phase1.measure.execution import compile_loss, execution, strict_compilation
from phase1.measure.memory.case import MemoryCase, MemoryPeaks, timeline_record
from phase1.measure.memory.estimate.estimate import CHIP, WARMUP_STEPS, estimate_memory
from phase1.measure.memory.limit import basis, cap_memory, outside_bytes, within_limit
from phase1.measure.memory.trace import PHASES, Timeline, measured_timeline
from phase1.measure.memory.tracker import MemoryTracker
from phase1.measure.workload import make_workload, optimizer_tensors, random_batch
from phase1.parallel import group
from phase1.parallel.run import processes
from phase1.records.schema import Basis, MemoryResult, Parameters
from phase1.training.step import TrainState, train_step

MEASURED_STEPS = 3
PROBE_SECONDS = 900.0  # for a process of six steps: where they take longer the card swaps or hangs, and the other cases wait


def memory_result(role: str, case: MemoryCase) -> MemoryResult:
    """The record of `case`: measured in a fresh process where there is a GPU, estimated otherwise or for a dry run.

    Every rank has such a process, and all get the record of the one that takes most.
    """
    found_by = basis(case.vram_limit_bytes, case.dry_run)
    outcomes: list[Outcome[MemoryPeaks]]
    if found_by == "estimated":
        outcomes = [group.from_first(lambda: run_here(estimate_memory, case, chip_of(case)))] * group.size()
    else:
        name = group.from_first(lambda: f"memory {secrets.token_hex(4)}")
        outcomes = group.gathered(run_isolated(measure_rank, case, name, timeout_s=PROBE_SECONDS))
    outcome = largest(outcomes)
    needed = None if outcome.value is None else outcome.value.needed_bytes
    result = as_result(role, case, within_limit(outcome, needed, case.vram_limit_bytes, found_by), found_by)
    if outcome.value is not None and case.ranks > 1:
        peaks = [each.value.peak_allocated_bytes for each in outcomes if each.value is not None]
        result = result.model_copy(update={"peak_by_rank_bytes": peaks})
    return with_estimate(result, case) if result.status == "oom" and found_by != "estimated" else result


def measure_rank(case: MemoryCase, name: str) -> MemoryPeaks:
    """`measure_memory` with the processes that the other ranks start for it."""
    with processes("memory", name):
        return measure_memory(case)


def largest(outcomes: list[Outcome[MemoryPeaks]]) -> Outcome[MemoryPeaks]:
    """That of the rank that ran out of memory, or failed, or took most."""
    for status in ("oom", "error"):
        if found := [outcome for outcome in outcomes if outcome.status == status]:
            return found[0]
    return max(outcomes, key=lambda outcome: 0 if outcome.value is None else outcome.value.peak_allocated_bytes)


def with_estimate(result: MemoryResult, case: MemoryCase) -> MemoryResult:
    """`result`, of a model that ran out of memory, with what it would have needed by the estimate."""
    peaks = run_here(estimate_memory, case, chip_of(case)).value
    if peaks is None:
        return result
    detail = f"{result.detail}; by the estimate a step needs {peaks.needed_bytes / 1e9:.1f} GB"
    update = {"estimated_peak_bytes": peaks.peak_allocated_bytes, "estimated_needed_bytes": peaks.needed_bytes}
    return result.model_copy(update=update | {"detail": detail})


def chip_of(case: MemoryCase) -> Chip:
    """The chip that an estimate is for: of the card that the case names, of the first GPU, or of the RTX 30 series."""
    if case.chip is not None:
        return case.chip
    if not torch.cuda.is_available():
        return CHIP
    properties = torch.cuda.get_device_properties(0)
    return Chip(properties.major, properties.minor, properties.multi_processor_count)


def as_result(role: str, case: MemoryCase, outcome: Outcome[MemoryPeaks], found_by: Basis) -> MemoryResult:
    """The record of an outcome, whether it is a measurement, out of memory or a failure."""
    common: dict[str, Any] = {
        "model_name": role,
        "config": asdict(case.model),
        "config_id": case.model.config_id,
        "status": outcome.status,
        "basis": found_by,
    }
    peaks = outcome.value
    advice = f"; {sizes_to_try(case)}" if outcome.status == "oom" else ""
    if peaks is None:
        return MemoryResult(**common, detail=outcome.message + advice)
    return MemoryResult(
        **common,
        detail=outcome.message + advice,
        parameters=Parameters(**peaks.parameters),
        peak_allocated_bytes=peaks.peak_allocated_bytes,
        peak_reserved_bytes=peaks.peak_reserved_bytes,
        outside_allocator_bytes=peaks.outside_allocator_bytes,
        peak_forward_bytes=peaks.phase_bytes["forward"],
        peak_backward_bytes=peaks.phase_bytes["backward"],
        peak_optimizer_bytes=peaks.phase_bytes["optimizer"],
        breakdown=peaks.breakdown,
        unattributed_bytes=peaks.unattributed_bytes,
        fragmentation_bytes=peaks.peak_reserved_bytes - peaks.peak_allocated_bytes,
        top_modules=peaks.top_modules,
        timeline=peaks.timeline,
        assumptions=peaks.assumptions,
        ran=peaks.ran,
    )


def measure_memory(case: MemoryCase) -> MemoryPeaks:
    """Peaks of whole training steps on the first GPU, as the allocator and the driver count them.

    Call it in a fresh process: the allocator's peaks and the driver's figures are of the process and of the card
    (other programs on the card count as outside the allocator).
    """
    cap_memory(case.model, case.vram_limit_bytes)
    state = make_workload(case.model, "cuda", piece_length=case.piece_length, optimizer=case.optimizer)
    batch = _batch(case, "cuda")
    compiler = compile_loss(state) if case.compiled else None
    with strict_compilation() if case.compiled else nullcontext():
        for _ in range(WARMUP_STEPS):
            train_step(state, [batch])
    phase_bytes = dict.fromkeys(PHASES, 0)
    reserved = torch.cuda.max_memory_reserved()

    def mark(name: str) -> None:
        nonlocal reserved
        if name == "communication":  # part of the optimizer's phase
            return
        if name != "start":
            phase_bytes[name] = max(phase_bytes[name], torch.cuda.max_memory_allocated())
            reserved = max(reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    for _ in range(MEASURED_STEPS):
        train_step(state, [batch], mark)
    torch.cuda.synchronize()
    outside = outside_bytes()
    ran = execution(state, compiler)
    # the operators of a compiled block are not those that its parts are named by
    timeline = None if case.compiled else _timeline(case, state, batch)
    return MemoryPeaks(
        basis="measured",
        parameters=state.model.parameter_counts(),
        phase_bytes=phase_bytes,
        peak_reserved_bytes=reserved,
        outside_allocator_bytes=outside,
        breakdown={} if timeline is None else timeline.parts_at_peak,
        top_modules={} if timeline is None else timeline.top_modules,
        timeline=None if timeline is None else timeline_record(timeline),
        ran=ran,
    )


class _CountedCuda:
    """`OperatorMemory` (phase1.measure.memory.tracker) of a step on the GPU, from the counters of its allocator."""

    def before(self, func: Any, phase: str) -> int:
        torch.cuda.reset_peak_memory_stats()
        return 0  # workspaces are there since the warm-up

    def after(self, func: Any, args: Any) -> tuple[int, int]:
        stats = torch.cuda.memory_stats_as_nested_dict()
        allocated, requested = stats["allocated_bytes"]["all"], stats["requested_bytes"]["all"]
        return allocated["peak"] - allocated["current"], allocated["current"] - requested["current"]


def _timeline(case: MemoryCase, state: TrainState, batch: tuple[Tensor, Tensor]) -> Timeline | None:
    """One more step, watched operator by operator. No part of it is derived from the peaks of the steps before.

    None where that step runs out of memory, though those before it did not: they are the result, this is its anatomy.
    """
    try:
        with MemoryTracker(case.model.vocab_size, "cuda", _CountedCuda()) as tracker:
            tracker.watch(state.model)
            tracker.label(optimizer_tensors(state), "optimizer_state", "(optimizer)")
            tracker.label(state.replicas.tensors(), "gradients", "(all ranks)")
            tracker.label(batch, "activations", "(batch)")
            train_step(state, [batch], tracker.mark)
    except torch.OutOfMemoryError:
        return None
    return measured_timeline(tracker.trace, _workspace_bytes())


def _workspace_bytes() -> int:
    """What cuBLAS holds inside the allocator: what is freed when PyTorch drops its workspaces. 0 where it cannot."""
    drop = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if drop is None:
        return 0
    torch.cuda.synchronize()
    before = _requested_bytes()
    drop()
    return before - _requested_bytes()


def _requested_bytes() -> int:
    stats = torch.cuda.memory_stats_as_nested_dict()
    return int(stats["requested_bytes"]["all"]["current"])


def sizes_to_try(case: MemoryCase) -> str:
    """What to lower when memory runs out; recomputation is a choice for the engine alone."""
    less = case.model.mixer == "ar_ssm" and case.model.recompute != "block"
    more = ("recomputation (--recompute block)",) if less else ()
    return smaller(batch=("--batch-size", case.batch_size), length=("--seq-length", case.seq_length), more=more)


def _batch(case: MemoryCase, device: str) -> tuple[Tensor, Tensor]:
    return random_batch(case.model.vocab_size, case.batch_size, case.seq_length, device)
