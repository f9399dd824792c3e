"""`phase1 memory`: does a training step fit an 8 GB and a 10 GB card, and how much less does the engine take?"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from phase1.checks.memory import memory_checks, with_reductions
from phase1.config import ModelConfig, flags
from phase1.factory import split
from phase1.machine.cards import CARDS, Card, card_for
from phase1.machine.environment import free_gpu_bytes, program_again, total_gpu_bytes
from phase1.measure.memory.ablation import ROWS, ablation
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.largest import fit_sizes
from phase1.measure.memory.limit import basis, check_limit, limit_bytes
from phase1.measure.memory.measured import memory_result
from phase1.parallel import group
from phase1.plots import plot_memory, plot_memory_timeline
from phase1.progress import progress
from phase1.records.schema import Ablation, Fit, MemoryResult, Report, exit_code
from phase1.records.session import Session
from phase1.roster import COMPILED, CONTROLS, PIECE_LENGTH, PIECES, TRANSFORMERS, model_config, own_models, sources
from phase1.runs import MemoryRun
from phase1.tables.console import checks_text, memory_text
from phase1.tables.grid import grid
from phase1.tables.screen import Screen, conditions, memory_numbers, text
from phase1.trainable import require_built
from phase1.world import is_first

PLOT: Final = "phase1_memory_breakdown.png"
TIMELINE_PLOT: Final = "phase1_memory_timeline.png"


def main(run: MemoryRun) -> int:
    """Write the memory report and its plots, and print the answer; see `MemoryRun` for the flags."""
    if run.card == "list":
        print(cards_text())
        return 0
    card = None if run.card is None else card_for(run.card)
    if run.fit and group.together():
        raise ValueError(f"--fit searches in one process; got {group.size()} of torchrun; start it without torchrun")
    free_bytes, limit = free_gpu_bytes(), limit_of(run)  # before this run takes some of it
    wanted = models(run)
    require_built(wanted.values())
    session = Session(run, "memory", data=sources(wanted))
    group.gate()  # until all ranks have read what is kept of an earlier run
    cases = cases_of(run, wanted, limit, card)
    results = with_reductions(dict(measured(cases, session)))
    ablated = with_one_change(cases, results, session) if run.ablate else []
    if not is_first():
        return 0
    if run.fit:
        results = with_fits(results, cases, session)
    found = any(result.status == "ok" for result in results.values())
    known = {"free_gpu_bytes": free_bytes, "vram_limit_bytes": limit, "card_name": None if card is None else card.title}
    report, files = session.write(
        results,
        memory_checks(results, free_bytes, limit, card),
        plots=[(plot_memory, PLOT), (plot_memory_timeline, TIMELINE_PLOT)] if found else [],
        run=session.settings | known,
        ablation=ablated,
    )
    session.close()  # before what may be cut off: `| head`
    if run.verbose:
        print(memory_text(report), checks_text(report.checks), sep="\n")
    print(text(screen(run, report, files)))
    return exit_code(report.checks)


def screen(run: MemoryRun, report: Report[MemoryResult], files: list[Any]) -> Screen:
    """What the report answers, and what to run next."""
    size = f"{run.batch_size} x {run.seq_length:,} tokens"
    return Screen(
        question=f"Memory of one training step of {size}: does it fit, and how much less is it? {conditions(report)}",
        numbers=memory_numbers(report),
        checks=report.checks,
        next=list(next_steps(run, report)),
        files=files,
    )


def next_steps(run: MemoryRun, report: Report[MemoryResult]) -> Iterator[str]:
    """The command that goes on from here."""
    for own in run.model:
        yield f"phase1 check-model {own}   whether it sees no future and learns: here it was not asked"
    if any(check.status == "fail" and check.name.startswith("fits_") for check in report.checks):
        half = replace(run, batch_size=max(1, run.batch_size // 2))
        yield f"{program_again()} memory {flags(half)}   what half the batch takes"
    elif not run.fit and (run.card or torch.cuda.is_available()):
        yield f"phase1 memory {flags(replace(run, fit=True))}   the largest batch and the longest sequence that train"
    elif not run.card and not torch.cuda.is_available():
        yield 'phase1 memory --card "RTX 3060" --fit   what trains on your card; --card list names all'
    elif not torch.cuda.is_available():
        yield "phase1 throughput --preset smoke   how speed is measured, at sizes for a CPU; the card's own needs the card"
    else:
        yield "phase1 throughput   how fast it is, and whether its time is linear in the length"


def cards_text() -> str:
    """Every card that --card knows by its key."""
    rows = [(card.key, card.title, str(card.gigabytes), f"{card.usable_bytes / 1e9:.1f}") for card in CARDS.values()]
    return grid(("--card", "name", "GB", "usable GB"), rows, [False, False, True, True])


def cases_of(run: MemoryRun, wanted: dict[str, ModelConfig], limit: int | None, card: Card | None) -> dict[str, MemoryCase]:
    """What is measured, by role."""
    size = (run.batch_size, run.seq_length, limit, run.dry_run)
    chip = None if card is None else card.chip
    where: dict[str, Any] = {"chip": chip, "ranks": group.size()}
    return {
        role: MemoryCase(
            model,
            *size,
            compiled=role in COMPILED,
            piece_length=PIECE_LENGTH if role in PIECES else run.piece_length,
            **where,
        )
        for role, model in wanted.items()
    }


def measured(cases: dict[str, MemoryCase], session: Session) -> Iterator[tuple[str, MemoryResult]]:
    """The result of every case."""
    with progress(cases.items(), desc="memory", unit="model") as bar:
        for role, case in bar:
            bar.set_postfix_str(role)
            yield role, session.case(role, MemoryResult, partial(memory_result, role, case))


def with_one_change(cases: dict[str, MemoryCase], results: dict[str, MemoryResult], session: Session) -> list[Ablation]:
    """What each component saves, every changed model a case of the journal."""

    def measure(role: str, case: MemoryCase) -> MemoryResult:
        return session.case(f"{role} as {case.model.config_id}", MemoryResult, partial(memory_result, role, case))

    return list(progress(ablation(cases, results, measure), desc="ablation", unit="row", total=ROWS))


def models(run: MemoryRun) -> dict[str, ModelConfig]:
    """The models to measure, by role."""
    roles = TRANSFORMERS if run.baseline else ()
    usual = {role: model_config(role, run) for role in roles}
    usual["phase1"] = model_config("phase1", run, recompute=run.recompute)
    in_pieces = run.piece_length is not None or any(name == "phase1" for name, _ in map(split, run.model))
    if not in_pieces and run.seq_length > PIECE_LENGTH:
        usual |= {role: model_config(role, run) for role in PIECES}
    return usual | own_models(run.model, run, taken=(*TRANSFORMERS[1:], *CONTROLS))


def limit_of(run: MemoryRun) -> int | None:
    """The bytes a model may have of the card; ValueError where the card has less, or --fit has no card at all."""
    limit = limit_bytes(run.vram_limit, run.card)
    if basis(limit, run.dry_run) != "estimated":
        check_limit(limit, total_gpu_bytes())
    elif run.fit and limit is None:
        raise ValueError("--fit needs a GPU or the size of one; got neither; give --card rtx4060 or --vram-limit 8GB")
    return limit


def with_fits(results: dict[str, MemoryResult], cases: dict[str, MemoryCase], session: Session) -> dict[str, MemoryResult]:
    """The results with the largest sizes of their models that train on the card.

    Of short pieces the longest sequence takes a GPU minutes a probe: --piece-length finds that of longer ones.
    """
    fitted, total = dict(results), total_gpu_bytes()
    with progress(desc="fit", unit="probe") as bar:
        for number, (role, result) in enumerate(results.items(), 1):

            def on_probe(size: str, model: str = f"{role} ({number} of {len(results)})") -> None:
                bar.set_postfix_str(f"{model}, {size}", refresh=False)
                bar.update()

            bar.set_postfix_str(f"{role} ({number} of {len(results)})")
            lengths = role not in PIECES or result.basis == "estimated"
            search = partial(fit_sizes, cases[role], result, total, on_probe, lengths)
            fitted[role] = result.model_copy(update={"fit": session.case(f"fit {role}", list[Fit], search)})
    return fitted
