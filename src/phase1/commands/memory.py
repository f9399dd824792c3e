"""`phase1 memory`: does a training step fit an 8 GB and a 10 GB card, and how much less does the engine take?"""

from functools import partial
from pathlib import Path
from typing import Final

from tqdm import tqdm

from phase1.checks.memory import memory_checks, with_reductions
from phase1.config import ModelConfig
from phase1.machine.environment import current_command, environment, free_gpu_bytes, machine, settings, total_gpu_bytes
from phase1.measure.memory.ablation import ROWS, ablation
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.largest import fit_sizes
from phase1.measure.memory.limit import basis, check_limit, limit_bytes
from phase1.measure.memory.measured import memory_result
from phase1.plots import plot_memory, plot_memory_timeline
from phase1.records.journal import Journal, open_journal
from phase1.records.schema import FILES, Ablation, Fit, MemoryResult, Report, exit_code, write_report
from phase1.roster import model_config
from phase1.runs import MemoryRun
from phase1.tables.console import checks_text, memory_text

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
        checks=memory_checks(results, free_bytes, limit, run.card),
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
