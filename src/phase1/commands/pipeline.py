"""`phase1 pipeline`: all measurements, their tables and a report one after the other; a failed step stops no other."""

import contextlib
import importlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from phase1.config import Config, flags
from phase1.errors import report_failure
from phase1.files import atomic_write
from phase1.machine.environment import deciding_settings, machine
from phase1.page import NAME as REPORT
from phase1.presets import PRESETS
from phase1.records.collect import read_reports
from phase1.records.journal import open_journal
from phase1.records.schema import Check, Report
from phase1.records.session import require_writable
from phase1.roster import ENGINE_ROLES
from phase1.runs import MemoryRun, PerplexityRun, PipelineRun, ReportRun, TablesRun, ThroughputRun
from phase1.tables.screen import Screen, conditions, model_title, text

LOG = "phase1_pipeline.log"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.md"
OF_OTHERS = ("tables", "report")  # made of what the other steps left: made again by --resume
WORDS = {0: "PASS", 1: "FAIL", 3: "INCONCLUSIVE"}


def main(run: PipelineRun) -> int:
    """Run every step with the sizes of the preset; the exit status is that of the worst step (5, 1, 2, 4, 3, then 0).

    What a step prints goes to the log; one summary of all steps is the last screen, and a file. With --resume, steps that
    ended are not run again, and the one that was interrupted goes on with its finished cases; a step that ended with an error
    is tried again. Raises ValueError, before any step runs, where the settings of one are wrong.
    """
    todo, out, began = steps(run), Path(run.out_dir), time.monotonic()
    require_writable(out)
    journal = open_journal(out / "phase1_pipeline.json", deciding_settings(run), machine=machine(), resume=run.resume)
    if "perplexity" not in journal:  # now, and not after two long steps
        _check_data(todo)
    codes: dict[str, int] = {}
    failed: list[tuple[str, str]] = []
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("a" if run.resume else "w", encoding="utf-8", errors="replace") as log:
        for name, config in todo:
            print(f"== phase1 {name} {flags(config)}".rstrip(), flush=True)
            step, started = partial(_run_step, name, config, None if run.verbose else log), time.monotonic()
            try:
                codes[name] = step() if name in OF_OTHERS else journal.case(name, int, step)
                word = WORDS.get(codes[name], "FAIL") if name not in OF_OTHERS else "written"
                print(f"   {name}: {word}, {_minutes(time.monotonic() - started)}", flush=True)
            except Exception as error:
                codes[name] = report_failure(name, error)
                failed.append((name, str(error)))
    if not failed:
        journal.close()
    summary = text(screen(run, failed, time.monotonic() - began))
    atomic_write(out / SUMMARY, f"```\n{summary}\n```\n".encode())
    print("", summary, sep="\n")
    return next((code for code in (5, 1, 2, 4, 3) if code in codes.values()), 0)


def _check_data(todo: list[tuple[str, Config]]) -> None:
    """Raise ValueError for a data set or tokenizer that the perplexity step would not find."""
    from phase1.data import check_names  # torch takes seconds to import

    for _, config in todo:
        if isinstance(config, PerplexityRun):
            check_names(config, vocab_size=config.vocab_size)


def _run_step(name: str, config: Config, log: TextIO | None) -> int:
    """The exit status of a step, whose output goes to `log`; its progress and errors stay on the terminal."""
    module = importlib.import_module(f"phase1.commands.{name}")
    with contextlib.nullcontext() if log is None else contextlib.redirect_stdout(log):
        print(f"== phase1 {name} {flags(config)}".rstrip(), flush=True)
        return int(module.main(config))


def screen(run: PipelineRun, failed: list[tuple[str, str]], seconds: float) -> Screen:
    """The last screen: one answer from the reports of all steps."""
    out = Path(run.out_dir)
    broken = {name for name, _ in failed}
    found = read_reports(out, damaged=lambda error: None)  # the steps tables and report have named a damaged file
    reports = {kind: report for kind, report in found.items() if kind not in broken}
    checks = [check for report in reports.values() for check in report.checks]
    where = next((conditions(reports[kind]) for kind in ("throughput", "perplexity", "memory") if kind in reports), "no report")
    files = f"tables: tables, *.png: {len(list(out.glob('*.png')))} plots, *.json: {len(reports)} result files"
    return Screen(
        question=f"phase1 summary: preset {run.preset}, {where}, {_minutes(seconds)}",
        numbers=list(_numbers(reports)),
        checks=checks,
        next=list(next_steps(run, failed, checks)),
        files=[*([out / REPORT] if "report" not in broken else []), out / SUMMARY, out / LOG, out / files],
        failed_steps=failed,
    )


def _numbers(reports: dict[str, Report[Any]]) -> Iterator[str]:
    """The engine against the Transformers, a line of each report."""
    if "memory" in reports:
        peaks = {key: r.peak_allocated_bytes for key, r in reports["memory"].results.items() if r.peak_allocated_bytes}
        yield "memory      " + "; ".join(f"{model_title(key)} {peak / 1e9:.2f} GB" for key, peak in peaks.items())
    timed = reports["throughput"].results if "throughput" in reports else {}
    if engine := next((timed[role] for role in ENGINE_ROLES if role in timed), None):
        ratios = [(m.seq_length, m.ratio_to_fastest) for m in engine.measurements if m.ratio_to_fastest]
        ends = [ratios[0], ratios[-1]] if len(ratios) > 1 else ratios
        said = ", ".join(f"{ratio:.2f} x at T = {length:,}" for length, ratio in ends) or "no Transformer ran"
        yield f"speed       engine against the fastest Transformer: {said}"
    if "perplexity" in reports:
        scored = {key: r.perplexity for key, r in reports["perplexity"].results.items() if r.perplexity and not r.untrained}
        yield "perplexity  " + (
            "; ".join(f"{model_title(key)} {value:,.2f}" for key, value in scored.items()) or "no trained model"
        )
    if any(result.basis == "estimated" for report in reports.values() for result in report.results.values()):
        yield "without a GPU memory is estimated; small sizes say little about speed and quality at full size"


def next_steps(run: PipelineRun, failed: list[tuple[str, str]], checks: list[Check]) -> Iterator[str]:
    """What to type after the summary."""
    if failed:
        yield f"phase1 pipeline {flags(run)} --resume   tries what failed again"
    elif engine := trained_engine(run):
        yield f'phase1 generate --checkpoint {engine} --prompt "The function returns"   what it has learnt to say'
    if any(check.status == "inconclusive" for check in checks) and run.preset == "smoke":
        sizes = {**asdict(dict(steps(run))["throughput"]), "measure_steps": 20}
        yield f"close other programs, then: phase1 throughput {flags(ThroughputRun(**sizes))}"
    if run.preset == "smoke":
        yield 'phase1 memory --card "RTX 3060" --fit   what trains on your card, no GPU needed'
        yield "phase1 pipeline --preset rtx3080-10g   full size, needs a GPU, hours"


def trained_engine(run: PipelineRun) -> Path | None:
    """The newest checkpoint of an engine that the run has trained, if there is one."""
    from phase1.training.checkpoint import INDEX  # torch takes seconds to import

    folders = [index.parent for index in (Path(run.out_dir) / CHECKPOINTS).glob(f"phase1_*/{INDEX}")]
    return max(folders, key=lambda folder: (folder / INDEX).stat().st_mtime, default=None)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def steps(run: PipelineRun) -> list[tuple[str, Config]]:
    """The commands and their configs, in order."""
    sizes = PRESETS[run.preset]
    common: dict[str, Any] = {"out_dir": run.out_dir, "baseline": run.baseline, "resume": run.resume, "verbose": run.verbose}
    names = ("dataset_name", "dataset_config")
    data: dict[str, Any] = {name: value for name in names if (value := getattr(run, name)) is not None}
    data |= {"offline": run.offline} | ({} if run.tokenizer == "auto" else {"tokenizer": run.tokenizer})
    checkpoints = str(Path(run.out_dir) / CHECKPOINTS)
    return [
        ("memory", MemoryRun(**(common | sizes["memory"]))),
        ("throughput", ThroughputRun(**(common | {"save_plots": True} | sizes["throughput"]))),
        ("perplexity", PerplexityRun(**(common | {"checkpoint_dir": checkpoints} | sizes["perplexity"] | data))),
        ("tables", TablesRun(results_dir=run.out_dir, verbose=run.verbose)),
        ("report", ReportRun(results_dir=run.out_dir)),
    ]
