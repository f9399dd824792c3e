"""Verdicts on memory: whether the engine's training step fits the cards, and how much less it needs than the baseline."""

from phase1.checks.limits import CARD_LIMITS, REDUCTION_LIMIT
from phase1.machine.cards import Card
from phase1.records.schema import Check, MemoryResult


def with_reductions(results: dict[str, MemoryResult]) -> dict[str, MemoryResult]:
    """The results with their reduction of allocated memory against `baseline`, 100 (1 - peak / baseline's peak).

    Of a baseline that ran out of memory, its estimated peak counts: it needs that much, whatever the card has.
    """
    base = _peak(results["baseline"]) if "baseline" in results else None
    reduced = {}
    for role, result in results.items():
        peak = _peak(result)
        known = base is not None and peak is not None and role != "baseline"
        percent = 100 * (1 - peak / base) if known else None  # type: ignore[operator]
        reduced[role] = result.model_copy(update={"memory_reduction_percent": percent})
    return reduced


def _peak(result: MemoryResult) -> int | None:
    return result.estimated_peak_bytes if result.peak_allocated_bytes is None else result.peak_allocated_bytes


def needed_bytes(result: MemoryResult) -> int | None:
    """Bytes of the card that a result needs: reserved, and outside the allocator; an estimate if it ran out of memory."""
    if result.peak_reserved_bytes is None or result.outside_allocator_bytes is None:
        return result.estimated_needed_bytes
    return result.peak_reserved_bytes + result.outside_allocator_bytes


def memory_checks(
    results: dict[str, MemoryResult], free_bytes: int | None, limit: int | None = None, card: Card | None = None
) -> list[Check]:
    """The claims of the engine: it fits both cards, or the one asked for, and takes less than half of the baseline's memory."""
    engine = results["phase1"]
    limits: dict[str, float] = dict(CARD_LIMITS) if card is None else {}
    if limit is not None:
        limits["fits_vram_limit" if card is None else "fits_" + card.key.replace("-", "_")] = limit
        free_bytes = limit if free_bytes is None else min(free_bytes, limit)
    fits = [_fits(name, limit, engine, free_bytes) for name, limit in limits.items()]
    one = [_one_sequence(engine)] if engine.fit else []
    return [*fits, *one, _reduction(engine, results.get("baseline"))]


def _one_sequence(engine: MemoryResult) -> Check:
    """Whether --fit found a batch at all."""
    batch = engine.fit[0]
    name, detail = "one_sequence_trains", f"{batch.basis}: largest batch at this sequence length"
    if batch.status == "ok":
        return Check(name=name, value=batch.batch_size, limit=1, status="pass", detail=detail)
    if batch.status == "oom":
        return Check(name=name, value=0, limit=1, status="fail", detail=f"{detail}; {batch.detail}")
    return Check.undecided(name, f"{detail} is not known; {batch.detail}", 1)


def _fits(name: str, limit: float, engine: MemoryResult, free_bytes: int | None) -> Check:
    value = needed_bytes(engine)
    if value is not None and (engine.peak_reserved_bytes is not None or value > limit):
        basis = engine.basis if engine.peak_reserved_bytes is not None else "estimated"
        detail = f"{basis}: bytes reserved by the allocator at the peak, plus those outside it"
        return Check.at_most(name, value, limit, detail)
    if engine.status == "oom" and free_bytes is not None and free_bytes >= limit:
        detail = f"{engine.basis}: out of memory with {free_bytes / 1e9:.2f} GB of the card to use"
        return Check(name=name, value=None, limit=limit, status="fail", detail=detail)
    return Check.undecided(name, f"{engine.basis}: the engine's peak is not known ({engine.status}: {engine.detail})", limit)


def _reduction(engine: MemoryResult, baseline: MemoryResult | None) -> Check:
    name, limit = "reduction_50_percent", REDUCTION_LIMIT
    value = engine.memory_reduction_percent
    if value is not None and baseline is not None:
        detail = f"{engine.basis}: percent less peak_allocated_bytes than baseline"
        needed = needed_bytes(baseline)
        if baseline.status == "oom" and needed is not None:
            detail += f", which does not fit: it needs {needed / 1e9:.1f} GB by the estimate"
        return Check.above(name, value, limit, detail)
    if baseline is None:
        why = "no baseline was measured (--no-baseline)"
    elif _peak(baseline) is None:
        why = f"no reduction can be stated: the baseline ended with {baseline.status} ({baseline.detail})"
    else:
        why = f"no reduction can be stated: the engine ended with {engine.status} ({engine.detail})"
    return Check.undecided(name, f"{engine.basis}: {why}", limit)
