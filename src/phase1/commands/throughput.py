"""`phase1 throughput`: tokens per second over sequence lengths, and whether the time is linear in the length."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

from phase1.advice import HOURS
from phase1.checks.throughput import control_checks, decoding_checks, throughput_checks
from phase1.config import ModelConfig, flags
from phase1.device import device_type
from phase1.factory import split
from phase1.machine.environment import program_again
from phase1.machine.isolate import run_isolated
from phase1.measure.throughput.decode import measure_decoding
from phase1.measure.throughput.disturbances import model_warnings, run_warnings
from phase1.measure.throughput.efficiency import card_of, with_efficiency
from phase1.measure.throughput.interleaved import ThroughputPlan, TimedModel, measure_throughput, throughput_results
from phase1.measure.throughput.monitor import Monitor
from phase1.measure.throughput.saturation import graphs_fail, saturating_batch
from phase1.measure.workload import control_batch_size
from phase1.parallel.group import from_first, gate
from phase1.plots import plot_throughput
from phase1.progress import progress
from phase1.records.schema import Decoding, Report, ThroughputResult, exit_code
from phase1.records.session import Session
from phase1.roster import COMPILED, CONTROLS, FAST, ROLES, TRANSFORMERS, model_config, own_models, sources
from phase1.runs import ThroughputRun
from phase1.stats.scaling import enough_lengths
from phase1.tables import decoding_comparison
from phase1.tables.console import checks_text, console, throughput_text
from phase1.tables.screen import Screen, conditions, decoding_numbers, text, throughput_numbers
from phase1.trainable import parameter_count, require_built
from phase1.training.step import compute_dtype, require_gpu_for_graphs
from phase1.world import is_first

PLOT: Final = "phase1_throughput_comparison.png"
SECONDS: Final = 600.0  # for a process that looks for a batch, or tries graphs
Way = dict[str, Any]
"""How the run measures, as its report says: batch_size, cuda_graphs, and why they are not what was asked, if so."""


def main(run: ThroughputRun) -> int:
    """Write the throughput report, its plot if asked, and print the answer; see `ThroughputRun` for the flags.

    Raises ValueError for CUDA graphs without a GPU.
    """
    device = device_type()
    if run.cuda_graphs:
        require_gpu_for_graphs(device)
    wanted = models(run, device)
    require_built(wanted.values())
    session = Session(run, "throughput", data=sources(wanted))
    gate()  # until all ranks have read what is kept of an earlier run
    precision = str(compute_dtype("auto", device)).removeprefix("torch.")
    way: Way = plain_way(run)
    if device == "cuda":
        way = session.case("way", dict[str, Any], lambda: from_first(lambda: way_on_gpu(run, wanted)))
    for line in [*way["otherwise"], *slow(run, wanted, device)]:
        print(f"phase1 throughput: {line}", file=sys.stderr)
    monitor = Monitor(device)
    contenders = measured(run, way, wanted, device, monitor, session)
    if not is_first():
        return 0
    card, basis = card_of(session.facts)
    results = {}
    for role, result in throughput_results(contenders).items():
        doubtful = result.model_copy(update={"warnings": model_warnings(result.measurements, device)})
        results[role] = with_efficiency(doubtful, wanted[role], card, basis, precision)
    if run.decode:
        sizes = run.decode_contexts, run.warmup_steps, run.measure_steps, way["cuda_graphs"], device
        decodings = session.case("generation", dict[str, Decoding], partial(measure_decoding, wanted, *sizes))
        for role, decoding in decodings.items():
            results[role] = results[role].model_copy(update={"decoding": decoding})
    report, files = session.write(
        results,
        throughput_checks(results["phase1"]) + control_checks(results) + decoding_checks(results),
        plots=[(plot_throughput, PLOT)] if run.save_plots and any(r.status == "ok" for r in results.values()) else [],
        run=session.settings | way | {"precision": precision, "batch_size_asked": run.batch_size},
        warnings=[*way["otherwise"], *run_warnings(monitor.samples, monitor.cpu_use())],
    )
    session.close()  # before what may be cut off: `| head`
    if run.verbose and run.decode:
        print(console(decoding_comparison(report)), end="\n\n")
    if run.verbose:
        print(throughput_text(report), checks_text(report.checks), sep="\n")
    print(text(screen(run, report, files)))
    return exit_code(report.checks)


def slow(run: ThroughputRun, wanted: dict[str, ModelConfig], device: str) -> list[str]:
    """What takes hours on a CPU."""
    if device != "cpu":
        return []
    tokens = run.batch_size * sum(run.seq_lengths) * (run.warmup_steps + run.measure_steps)
    work = sum(6 * tokens * parameter_count(config) for config in wanted.values())
    return ["that is hours on a CPU; --preset smoke measures small models in minutes"] * (work > HOURS)


def plain_way(run: ThroughputRun) -> Way:
    """The way that the user asked for."""
    return {"batch_size": run.batch_size, "cuda_graphs": bool(run.cuda_graphs), "otherwise": []}


def way_on_gpu(run: ThroughputRun, wanted: dict[str, ModelConfig]) -> Way:
    """Whether to launch CUDA graphs, and how many sequences: what was asked, unless the GPU cannot or has nothing to do."""
    way = plain_way(run)
    if run.cuda_graphs is None:
        outcome = run_isolated(graphs_fail, wanted, min(run.seq_lengths), run.piece_length, timeout_s=SECONDS)
        why = outcome.message if outcome.value is None else outcome.value
        way["cuda_graphs"] = not why
        way["otherwise"] += [f"without CUDA graphs, so short steps may take the host's time: {why}"] if why else []
    if run.saturate:
        engine, lengths = wanted["phase1"], (min(run.seq_lengths), max(run.seq_lengths))
        sized = {role: config for role, config in wanted.items() if role != "quadratic_control"}
        arguments = (engine, sized, run.batch_size, *lengths, way["cuda_graphs"], run.piece_length)
        found = run_isolated(saturating_batch, *arguments, timeout_s=SECONDS)
        batch, why = found.value or (run.batch_size, f"no larger batch was tried: {found.message}")
        way["batch_size"] = batch
        if why:
            way["otherwise"].append(f"measured with {batch} sequences, not {run.batch_size}: {why} (--no-saturate keeps them)")
    return way


def models(run: ThroughputRun, device: str) -> dict[str, ModelConfig]:
    """The models to measure, by role."""
    roles = [role for role in ROLES if run.baseline or role == "phase1"]
    roles += FAST if device == "cuda" and not any(name == "phase1" for name, _ in map(split, run.model)) else []
    roles += ["quadratic_control"] * run.quadratic_control
    roles += ["baseline_again" if run.baseline else "engine_again"] * run.a_a
    usual = {role: model_config(role, run) for role in roles}
    return usual | own_models(run.model, run, taken=(*TRANSFORMERS[1:], *CONTROLS))


def measured(
    run: ThroughputRun, way: Way, wanted: dict[str, ModelConfig], device: str, monitor: Monitor, session: Session
) -> dict[str, TimedModel]:
    """Every model at every length, with a bar of tokens: a step of 4,096 of them takes longer than one of 512."""
    memory = session.facts.get("gpu_memory_bytes" if device == "cuda" else "ram_bytes")
    batch_sizes = {
        role: control_batch_size(config, way["batch_size"], max(run.seq_lengths), int(memory) if memory else None)
        for role, config in wanted.items()
        if role == "quadratic_control"
    }
    compiled = set(wanted) if run.compile else COMPILED & wanted.keys() if device == "cuda" else set()
    sizes = (run.seq_lengths, way["batch_size"], run.warmup_steps, run.measure_steps)
    plan = ThroughputPlan(*sizes, frozenset(compiled), way["cuda_graphs"], batch_sizes, run.piece_length)
    steps = sum(set(run.seq_lengths)) * (run.warmup_steps + run.measure_steps)
    sequences: list[int] = [batch_sizes.get(role) or way["batch_size"] for role in wanted]
    with progress(total=sum(sequences) * steps, desc=f"throughput on {device}", unit="tok", unit_scale=True) as bar:
        return measure_throughput(wanted, plan, device, bar.update, monitor.sample, session.journal)


def screen(run: ThroughputRun, report: Report[ThroughputResult], files: list[Any]) -> Screen:
    """What the report answers, and what to run next."""
    size = report.run["batch_size"]
    return Screen(
        question=f"Speed of training steps, B = {size}: how fast, and is their time linear in T? {conditions(report)}",
        numbers=[
            *throughput_numbers(report),
            *decoding_numbers(report),
            *(f"note  {line}"[:220] for line in report.warnings[:2]),
        ],
        checks=report.checks,
        next=list(next_steps(run, report)),
        files=files,
    )


def next_steps(run: ThroughputRun, report: Report[ThroughputResult]) -> Iterator[str]:
    """What would decide what is undecided, or the next command."""
    for own in run.model:
        yield f"phase1 check-model {own}   whether it sees no future and learns: here it was not asked"
    longer_lengths = enough_lengths(run.seq_lengths)
    if set(longer_lengths) - set(run.seq_lengths):
        yield f"{program_again()} throughput {flags(replace(run, seq_lengths=longer_lengths))}   lengths that can decide"
    elif any(check.status == "inconclusive" for check in report.checks):
        longer = replace(run, measure_steps=2 * run.measure_steps)
        yield f"{program_again()} throughput {flags(longer)}   more steps; on an idle machine"
    else:
        yield "phase1 perplexity   what it costs in quality"
