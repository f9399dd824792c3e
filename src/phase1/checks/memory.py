"""Does the engine's training step fit the cards, and in how much less memory than the baseline's?"""

from phase1.checks.limits import CARD_LIMITS, REDUCTION_LIMIT
from phase1.machine.cards import card_for
from phase1.records.schema import Check, MemoryResult


def with_reductions(results: dict[str, MemoryResult]) -> dict[str, MemoryResult]:
    """The results with their reduction of allocated memory against `baseline`, 100 (1 - peak / baseline's peak)."""
    base = results["baseline"].peak_allocated_bytes if "baseline" in results else None
    reduced = {}
    for role, result in results.items():
        peak = result.peak_allocated_bytes
        known = base is not None and peak is not None and role != "baseline"
        percent = 100 * (1 - peak / base) if known else None  # type: ignore[operator]
        reduced[role] = result.model_copy(update={"memory_reduction_percent": percent})
    return reduced


def memory_checks(
    results: dict[str, MemoryResult], free_bytes: int | None, limit: int | None = None, card: str | None = None
) -> list[Check]:
    """The claims of the engine: it fits both cards and the one asked for, and takes less than half of the baseline's memory."""
    engine = results["phase1"]
    limits: dict[str, float] = dict(CARD_LIMITS)
    if limit is not None:
        limits["fits_vram_limit" if card is None else "fits_" + card_for(card).key.replace("-", "_")] = limit
        free_bytes = limit if free_bytes is None else min(free_bytes, limit)
    fits = [_fits(name, limit, engine, free_bytes) for name, limit in limits.items()]
    one = [_one_sequence(engine)] if engine.fit else []
    return [*fits, *one, _reduction(engine, results.get("baseline"))]


def _one_sequence(engine: MemoryResult) -> Check:
    """Whether --fit found a batch at all."""
    batch = engine.fit[0]
    name, detail = "one_sequence_trains", f"{batch.measured}: largest batch at this sequence length"
    if batch.status == "ok":
        return Check(name=name, value=batch.batch_size, limit=1, status="pass", detail=detail)
    if batch.status == "oom":
        return Check(name=name, value=0, limit=1, status="fail", detail=f"{detail}; {batch.detail}")
    return Check(name=name, value=None, limit=1, status="inconclusive", detail=f"{detail} is not known; {batch.detail}")


def _fits(name: str, limit: float, engine: MemoryResult, free_bytes: int | None) -> Check:
    if engine.status == "oom" and free_bytes is not None and free_bytes >= limit:
        detail = f"{engine.measured}: out of memory with {free_bytes / 1e9:.2f} GB of the card to use"
        return Check(name=name, value=None, limit=limit, status="fail", detail=detail)
    if engine.status != "ok" or engine.peak_reserved_bytes is None or engine.outside_allocator_bytes is None:
        detail = f"{engine.measured}: the engine's peak is not known ({engine.status}: {engine.detail})"
        return Check(name=name, value=None, limit=limit, status="inconclusive", detail=detail)
    value = engine.peak_reserved_bytes + engine.outside_allocator_bytes
    detail = f"{engine.measured}: bytes reserved by the allocator at the peak, plus those outside it"
    return Check(name=name, value=value, limit=limit, status="pass" if value <= limit else "fail", detail=detail)


def _reduction(engine: MemoryResult, baseline: MemoryResult | None) -> Check:
    name, limit = "reduction_50_percent", REDUCTION_LIMIT
    value = engine.memory_reduction_percent
    if value is not None:
        detail = f"{engine.measured}: percent less peak_allocated_bytes than baseline"
        return Check(name=name, value=value, limit=limit, status="pass" if value > limit else "fail", detail=detail)
    if baseline is None:
        why = "no baseline was measured (--no-baseline)"
    elif baseline.status != "ok":
        why = f"no reduction can be stated: the baseline ended with {baseline.status} ({baseline.detail})"
    else:
        why = f"no reduction can be stated: the engine ended with {engine.status} ({engine.detail})"
    return Check(name=name, value=None, limit=limit, status="inconclusive", detail=f"{engine.measured}: {why}")
