"""`phase1 throughput`: tokens per second over sequence lengths, and whether the time is linear in the length."""

from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from phase1.config import ROLES, ModelConfig, ThroughputRun, model_config
from phase1.journal import Journal, open_journal
from phase1.measure.conditions import model_warnings, run_warnings
from phase1.measure.controls import COPIES, a_a_check, control_batch_size, control_check
from phase1.measure.efficiency import card_of, with_efficiency
from phase1.measure.environment import Fact, current_command, environment, machine, settings
from phase1.measure.monitor import Monitor
from phase1.measure.scaling import MIN_LENGTHS
from phase1.measure.throughput import Contender, ThroughputPlan, measure_throughput, throughput_results
from phase1.record import FILES, Check, Report, ThroughputResult, exit_code, write_report
from phase1.report import checks_text, plot_throughput, throughput_text
from phase1.train import compute_dtype, require_gpu_for_graphs

R_SQUARED_LIMIT: Final = 0.95
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
    report = Report[ThroughputResult](
        kind="throughput",
        environment=facts,
        command=current_command(),
        run=settings(run) | {"precision": precision},
        results=results,
        checks=checks(results["phase1"]) + control_checks(results),
        warnings=disturbed,
    )
    write_report(report, path)
    written = [path]
    if run.save_plots and any(result.status == "ok" for result in results.values()):
        written.append(plot_throughput(report, path.with_name(PLOT)))
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


def control_checks(results: dict[str, ThroughputResult]) -> list[Check]:
    """The checks of the measurement itself, of the controls that were measured."""
    copies = [(results[copy], results[original]) for copy, original in COPIES.items() if copy in results]
    found = [a_a_check(*pair) for pair in copies]
    return found + [control_check(results[role]) for role in ("quadratic_control",) if role in results]


def checks(engine: ThroughputResult) -> list[Check]:
    """The claims of the engine: its verdict is linear, and a straight line explains its times."""
    fit = engine.scaling
    if fit is None:
        detail = f"the engine was measured at no length ({engine.status}: {engine.detail})"
        return [
            Check(name="scaling_linear", value=None, limit=None, status="inconclusive", detail=detail),
            Check(name="r_squared", value=None, limit=R_SQUARED_LIMIT, status="inconclusive", detail=detail),
        ]
    verdict = {"linear": "pass", "not linear": "fail", "inconclusive": "inconclusive"}[fit.verdict]
    linear = Check.model_validate(
        {
            "name": "scaling_linear",
            "value": fit.exponent,
            "limit": None,
            "status": verdict,
            "detail": f"exponent of the step time in T; {fit.verdict}{': ' if fit.detail else ''}{fit.detail}",
        }
    )
    return [linear, _r_squared(fit.r_squared, sum(m.status == "ok" for m in engine.measurements))]


def _r_squared(value: float | None, lengths: int) -> Check:
    name, limit = "r_squared", R_SQUARED_LIMIT
    if value is None or lengths < MIN_LENGTHS:  # a line through two points explains everything
        detail = f"a line needs {MIN_LENGTHS} lengths to be tested; got {lengths}; give more --seq-lengths"
        return Check(name=name, value=value, limit=limit, status="inconclusive", detail=detail)
    detail = "of t = a + b T; necessary, not sufficient: T^2 over 512 to 4096 reaches 0.962"
    return Check(name=name, value=value, limit=limit, status="pass" if value > limit else "fail", detail=detail)
