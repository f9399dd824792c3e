"""`phase1 memory`: does a training step fit an 8 GB and a 10 GB card, and how much less does the engine take?"""

from functools import partial
from pathlib import Path
from typing import Final

from tqdm import tqdm

from phase1.config import MemoryRun, ModelConfig, model_config
from phase1.journal import Journal, open_journal
from phase1.measure.ablate import ROWS, ablation
from phase1.measure.cards import card_for
from phase1.measure.environment import current_command, environment, free_gpu_bytes, machine, settings, total_gpu_bytes
from phase1.measure.fit import fit_sizes
from phase1.measure.limit import basis, check_limit, limit_bytes
from phase1.measure.memory import MemoryCase, memory_result
from phase1.record import FILES, Ablation, Check, Fit, MemoryResult, Report, exit_code, write_report
from phase1.report import checks_text, memory_text, plot_memory, plot_memory_timeline

CARD_LIMITS: Final = {"fits_8gb": 7.2e9, "fits_10gb": 9.0e9}  # bytes, 90 % of the card (docs/design.md, "Definitions")
REDUCTION_LIMIT: Final = 50.0  # percent
PLOT: Final = "phase1_memory_breakdown.png"
TIMELINE_PLOT: Final = "phase1_memory_timeline.png"


def main(run: MemoryRun) -> int:
    """Write the memory report and its plot, and print it; see `MemoryRun` for the flags."""
    free_bytes, limit = free_gpu_bytes(), limit_of(run)  # before this run takes some of it
    cases = {role: MemoryCase(model, run.batch_size, run.seq_length, limit, run.dry_run) for role, model in models(run).items()}
    path = Path(run.out_dir) / FILES["memory"]
    journal = open_journal(path, settings(run), machine=machine(), resume=run.resume)
    results: dict[str, MemoryResult] = {}
    for role, case in tqdm(cases.items(), desc="memory", unit="model", disable=None):
        results[role] = journal.case(role, MemoryResult, partial(memory_result, role, case))
    results = with_reductions(results)
    if run.fit:
        results = with_fits(results, cases, journal)
    report = Report[MemoryResult](
        kind="memory",
        environment=environment(),
        command=current_command(),
        run=settings(run) | {"free_gpu_bytes": free_bytes, "vram_limit_bytes": limit},
        results=results,
        checks=checks(results, free_bytes, limit, run.card),
        ablation=with_one_change(cases, results, journal) if run.ablate else [],
    )
    write_report(report, path)
    written = [path]
    if any(result.status == "ok" for result in results.values()):
        written.append(plot_memory(report, path.with_name(PLOT)))
        written.append(plot_memory_timeline(report, path.with_name(TIMELINE_PLOT)))
    print(memory_text(report), checks_text(report.checks), *(f"written: {p}" for p in written), sep="\n")
    journal.close()  # last: until here --resume finds every case
    return exit_code(report.checks)


def with_one_change(cases: dict[str, MemoryCase], results: dict[str, MemoryResult], journal: Journal) -> list[Ablation]:
    """What each component saves, every changed model a case of the journal."""

    def measure(role: str, case: MemoryCase) -> MemoryResult:
        return journal.case(f"{role} as {case.model.config_id}", MemoryResult, partial(memory_result, role, case))

    return list(tqdm(ablation(cases, results, measure), desc="ablation", unit="row", total=ROWS, disable=None))


def models(run: MemoryRun) -> dict[str, ModelConfig]:
    """The models to measure, by role."""
    roles = ("baseline", "baseline_optimized") if run.baseline else ()
    engine = {} if run.gradient_checkpointing else {"checkpointing": False}
    return {role: model_config(role, run) for role in roles} | {"phase1": model_config("phase1", run, **engine)}


def limit_of(run: MemoryRun) -> int | None:
    """The bytes a model may have of the card; ValueError where the card has less, or --fit has no card at all."""
    limit = limit_bytes(run.vram_limit, run.card)
    if basis(limit, run.dry_run) != "estimated":
        check_limit(limit, total_gpu_bytes())
    elif run.fit and limit is None:
        raise ValueError("--fit needs a GPU or the size of one; got neither; give --card rtx4060 or --vram-limit 8GB")
    return limit


def with_fits(results: dict[str, MemoryResult], cases: dict[str, MemoryCase], journal: Journal) -> dict[str, MemoryResult]:
    """The results with the largest sizes of their models that train on the card."""
    fitted, total = {}, total_gpu_bytes()
    with tqdm(desc="fit", unit="probe", disable=None) as bar:
        for role, result in results.items():
            bar.set_postfix_str(role)
            search = partial(fit_sizes, cases[role], result, total, bar.update)
            fitted[role] = result.model_copy(update={"fit": journal.case(f"fit {role}", list[Fit], search)})
    return fitted


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


def checks(
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
