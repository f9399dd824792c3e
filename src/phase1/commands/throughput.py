"""`phase1 throughput`: tokens per second over sequence lengths, and whether the time is linear in the length."""

from functools import partial
from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from phase1.checks.throughput import control_checks, decoding_checks, throughput_checks
from phase1.config import ModelConfig
from phase1.machine.environment import Fact, current_command, environment, machine, settings
from phase1.measure.throughput.decode import measure_decoding
from phase1.measure.throughput.disturbances import model_warnings, run_warnings
from phase1.measure.throughput.efficiency import card_of, with_efficiency
from phase1.measure.throughput.interleaved import Contender, ThroughputPlan, measure_throughput, throughput_results
from phase1.measure.throughput.monitor import Monitor
from phase1.measure.workload import control_batch_size
from phase1.plots import plot_throughput
from phase1.records.journal import Journal, open_journal
from phase1.records.schema import FILES, Decoding, Report, ThroughputResult, exit_code, write_report
from phase1.roster import ROLES, model_config
from phase1.runs import ThroughputRun
from phase1.tables import decoding_comparison
from phase1.tables.console import checks_text, console, throughput_text
from phase1.training.step import compute_dtype, require_gpu_for_graphs

PLOT: Final = "phase1_throughput_comparison.png"


def main(run: ThroughputRun) -> int:
    """Write the throughput report, its plot if asked, and print it; see `ThroughputRun` for the flags.

    Raises ValueError for CUDA graphs without a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.cuda_graphs:
        require_gpu_for_graphs(device)
    wanted, facts, precision = models(run), environment(), str(compute_dtype("auto", device)).removeprefix("torch.")
    path = Path(run.out_dir) / FILES["throughput"]
    journal = open_journal(path, settings(run), machine=machine(), resume=run.resume)
    monitor = Monitor(device)
    contenders = _measured(run, wanted, device, facts, monitor, journal)
    disturbed = run_warnings(monitor.samples, monitor.cpu_use())
    card, basis = card_of(facts)
    results = {
        role: with_efficiency(
            result.model_copy(update={"warnings": model_warnings(result.measurements, device)}),
            wanted[role], card, basis, precision,
        )
        for role, result in throughput_results(contenders).items()
    }  # fmt: skip
    if run.decode:
        sizes = run.decode_contexts, run.warmup_steps, run.measure_steps, run.cuda_graphs, device
        decodings = journal.case("generation", dict[str, Decoding], partial(measure_decoding, wanted, *sizes))
        for role, decoding in decodings.items():
            results[role] = results[role].model_copy(update={"decoding": decoding})
    report = Report[ThroughputResult](
        kind="throughput",
        environment=facts,
        command=current_command(),
        run=settings(run) | {"precision": precision},
        results=results,
        checks=throughput_checks(results["phase1"]) + control_checks(results) + decoding_checks(results),
        warnings=disturbed,
    )
    write_report(report, path)
    written = [path]
    if run.save_plots and any(result.status == "ok" for result in results.values()):
        written.append(plot_throughput(report, path.with_name(PLOT)))
    if run.decode:
        print(console(decoding_comparison(report)), end="\n\n")
    print(throughput_text(report), checks_text(report.checks), *(f"written: {p}" for p in written), sep="\n")
    journal.close()  # last: until here --resume finds every case
    return exit_code(report.checks)


def models(run: ThroughputRun) -> dict[str, ModelConfig]:
    """The models to measure, by role."""
    roles = [role for role in ROLES if run.baseline or role == "phase1"]
    roles += ["quadratic_control"] * run.quadratic_control
    roles += ["baseline_again" if run.baseline else "engine_again"] * run.a_a
    return {role: model_config(role, run) for role in roles}


def _measured(
    run: ThroughputRun, wanted: dict[str, ModelConfig], device: str, facts: dict[str, Fact], monitor: Monitor, journal: Journal
) -> dict[str, Contender]:
    memory = facts.get("gpu_memory_bytes" if device == "cuda" else "ram_bytes")
    batch_sizes = {
        role: control_batch_size(config, run.batch_size, max(run.seq_lengths), int(memory) if memory else None)
        for role, config in wanted.items()
        if role == "quadratic_control"
    }
    sizes = (run.seq_lengths, run.batch_size, run.warmup_steps, run.measure_steps)
    plan = ThroughputPlan(*sizes, run.compile, run.cuda_graphs, batch_sizes)
    steps = len(wanted) * len(set(run.seq_lengths)) * (run.warmup_steps + run.measure_steps)
    with tqdm(total=steps, desc=f"throughput on {device}", unit="step", disable=None) as bar:
        return measure_throughput(wanted, plan, device, bar.update, monitor.sample, journal)
