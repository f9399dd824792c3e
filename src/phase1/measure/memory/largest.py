"""The largest batch and the longest sequence that train on a card: `phase1 memory --fit`."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import torch

from phase1.machine.isolate import run_here, run_isolated
from phase1.measure.execution import compile_loss
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import WARMUP_STEPS, estimate_memory, pieces_to_trace
from phase1.measure.memory.limit import basis, cap_memory, outside_bytes, within_limit
from phase1.measure.memory.measured import PROBE_SECONDS, chip_of
from phase1.measure.memory.search import Probe, edge, largest_size
from phase1.measure.workload import make_workload, random_batch
from phase1.records.schema import Fit, FitProbe, MemoryResult
from phase1.training.pieces import in_pieces
from phase1.training.step import train_step

BATCH_BOUND = 4096  # sequences
TOKENS_BOUND = 2**20  # tokens of one step
PIECES_BOUND = 2**24  # tokens of one step in pieces
LENGTH_STEP = 64  # tokens
FIT_SECONDS = 120.0  # for both searches of one model on a GPU, where a probe is a process and some steps
BATCH_SHARE = 0.6  # share of FIT_SECONDS for the search of the batch
_RESIDENT = ("parameters", "buffers", "optimizer_state")  # parts of a breakdown that do not depend on the batch


def fit_sizes(
    case: MemoryCase, known: MemoryResult, card_bytes: int | None, on_probe: Callable[[str], object], lengths: bool = True
) -> list[Fit]:
    """The largest batch at the sequence length of `case`, then, with `lengths`, the longest sequence at a batch of 1.

    known: the result of `case` itself, which costs no further probe.
    card_bytes: memory of the card; where `case` has no limit, it places the probes, and no verdict depends on it.
    on_probe: called after every probe, with its size and how it ended.

    On a GPU a search ends with the largest size that has trained before another probe might take it past its part of
    FIT_SECONDS.
    """
    longest, began, timed = 0.0, time.monotonic(), basis(case.vram_limit_bytes, case.dry_run) != "estimated"
    limit = card_bytes if case.vram_limit_bytes is None else case.vram_limit_bytes
    resident, measured = _probes_of(known)

    def batch(size: int) -> MemoryCase:
        return replace(case, batch_size=size)

    def length(size: int) -> MemoryCase:
        return replace(case, batch_size=1, seq_length=LENGTH_STEP * size)

    def search(
        sized: Callable[[int], MemoryCase], start: int, bound: int, more: dict[int, Probe], share: float
    ) -> dict[int, Probe]:
        def counted(size: int) -> Probe:
            nonlocal longest
            one, before = sized(size), time.monotonic()
            probe = probe_size(one)
            longest = max(longest, time.monotonic() - before)
            on_probe(f"{one.batch_size} x {one.seq_length}: {'trains' if probe.status == 'ok' else probe.status}")
            return probe

        def out_of_time() -> bool:
            return timed and time.monotonic() - began + longest > share * FIT_SECONDS

        return largest_size(counted, min(start, bound), bound, limit, resident | more, out_of_time)

    bound = max(1, min(BATCH_BOUND, TOKENS_BOUND // case.seq_length))
    usable = case.batch_size <= bound and measured.status != "error"  # a crash is worth a second try
    probes = search(batch, case.batch_size, bound, {case.batch_size: measured} if usable else {}, BATCH_SHARE)
    batches = _as_fit("batch_size", batch, 1, bound, probes)
    if not lengths:
        return [batches]
    bound = (PIECES_BOUND if in_pieces(case.model, case.piece_length) else TOKENS_BOUND) // LENGTH_STEP
    tokens = (batches.batch_size or 1) * case.seq_length  # a step of as many tokens is a good first guess
    probes = search(length, max(1, tokens // LENGTH_STEP), bound, {}, 1.0)
    return [batches, _as_fit("seq_length", length, LENGTH_STEP, bound, probes)]


def probe_size(case: MemoryCase) -> Probe:
    """Whether steps of `case` run within its limit: on a GPU in a fresh process, which leaves nothing behind; else estimated.

    Nothing but `case` goes in and nothing but the answer comes out, so a probe cannot depend on the one before.
    """
    found_by = basis(case.vram_limit_bytes, case.dry_run)
    if found_by == "estimated":
        outcome = run_here(_estimated_bytes, case)
    else:
        outcome = run_isolated(train_briefly, case, timeout_s=PROBE_SECONDS)
    needed = outcome.value
    outcome = within_limit(outcome, needed, case.vram_limit_bytes, found_by)
    return Probe(outcome.status, needed, outcome.message)


def train_briefly(case: MemoryCase) -> int:
    """Train as many steps as memory needs to reach its peak; the bytes of the card that took. In a fresh process."""
    cap_memory(case.model, case.vram_limit_bytes)
    state = make_workload(case.model, "cuda", piece_length=case.piece_length, optimizer=case.optimizer)
    if case.compiled:
        compile_loss(state)
    batch = random_batch(case.model.vocab_size, case.batch_size, case.seq_length, "cuda")
    few = pieces_to_trace(case)  # of many pieces some are enough for all but the peak itself
    warmup = batch if few is None else (batch[0][:, : few[0]], batch[1][:, : few[0]])
    for step in [*[warmup] * WARMUP_STEPS, batch]:
        train_step(state, [step])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() + outside_bytes()


def _estimated_bytes(case: MemoryCase) -> int:
    return estimate_memory(case, chip_of(case)).needed_bytes


def _probes_of(result: MemoryResult) -> tuple[dict[int, Probe], Probe]:
    """What a batch of size 0 would need, if that is known, and the probe that `result` amounts to."""
    if result.peak_reserved_bytes is None or result.outside_allocator_bytes is None:
        return {}, Probe(result.status, None, result.detail)
    resident = result.outside_allocator_bytes + sum(result.breakdown.get(part, 0) for part in _RESIDENT)
    needed = result.peak_reserved_bytes + result.outside_allocator_bytes
    return {0: Probe("ok", resident)}, Probe(result.status, needed, result.detail)


def _as_fit(
    searched: Literal["batch_size", "seq_length"],
    sized: Callable[[int], MemoryCase],
    step: int,
    bound: int,
    probes: dict[int, Probe],
) -> Fit:
    """The record of a search; size 0 was a guide, not a probe."""
    tried = [(sized(size), probe) for size, probe in probes.items() if size > 0]
    failed = next((probe for _, probe in tried if probe.status == "error"), None)
    best, refused = edge(probes, bound)
    limit, dry_run = sized(1).vram_limit_bytes, sized(1).dry_run
    common: dict[str, Any] = {
        "searched": searched,
        "step": step,
        "bound": bound * step,
        "limit_bytes": limit,
        "basis": basis(limit, dry_run),
        "probes": [FitProbe(batch_size=c.batch_size, seq_length=c.seq_length, **asdict(probe)) for c, probe in tried],
    }
    if failed is not None:
        return Fit(**common, status="error", detail=failed.detail)
    if best == 0:
        smallest = min((size for size, _ in probes.items() if size > 0), default=1)
        return Fit(**common, status="oom", detail=f"not even {step * smallest} fits: {probes[smallest].detail}")
    detail = ""
    if refused - best > 1:
        beyond = f"{step * refused} does not" if refused <= bound else "no larger one was tried"
        detail = f"the search ended after {FIT_SECONDS:.0f} s: {step * best} trains, {beyond}; sizes between are not known"
    found = sized(best)
    return Fit(**common, status="ok", batch_size=found.batch_size, seq_length=found.seq_length, detail=detail)
