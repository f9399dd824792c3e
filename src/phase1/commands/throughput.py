"""`phase1 throughput`: tokens per second over sequence lengths, and whether the time is linear in the length."""

from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from phase1.config import ROLES, ModelConfig, ThroughputRun, model_config
from phase1.journal import open_journal
from phase1.measure.environment import current_command, environment, machine, settings
from phase1.measure.scaling import MIN_LENGTHS
from phase1.measure.throughput import ThroughputPlan, measure_throughput, throughput_result
from phase1.record import FILES, Check, Report, ThroughputResult, exit_code, write_report
from phase1.report import checks_text, plot_throughput, throughput_text
from phase1.train import compute_dtype

R_SQUARED_LIMIT: Final = 0.95
PLOT: Final = "phase1_throughput_comparison.png"


def main(run: ThroughputRun) -> int:
    """Write the throughput report, its plot if asked, and print it; see `ThroughputRun` for the flags."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = ThroughputPlan(run.seq_lengths, run.batch_size, run.warmup_steps, run.measure_steps, run.compile, run.cuda_graphs)
    wanted = models(run)
    path = Path(run.out_dir) / FILES["throughput"]
    journal = open_journal(path, settings(run), machine=machine(), resume=run.resume)
    steps = len(wanted) * len(set(run.seq_lengths)) * (run.warmup_steps + run.measure_steps)
    with tqdm(total=steps, desc=f"throughput on {device}", unit="step", disable=None) as bar:
        contenders = measure_throughput(wanted, plan, device, bar.update, journal)
    results = {role: throughput_result(role, contender) for role, contender in contenders.items()}
    report = Report[ThroughputResult](
        kind="throughput",
        environment=environment(),
        command=current_command(),
        run=settings(run) | {"precision": str(compute_dtype("auto", device)).removeprefix("torch.")},
        results=results,
        checks=checks(results["phase1"]),
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
    return {role: model_config(role, run) for role in ROLES if run.baseline or role == "phase1"}


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
