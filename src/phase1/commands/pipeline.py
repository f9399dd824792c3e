"""`phase1 pipeline`: the four scripts one after the other; a step that fails does not stop the next."""

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from phase1.config import Config, flags
from phase1.errors import FAILURES, error_line, exit_status
from phase1.machine.environment import machine, settings
from phase1.presets import PRESETS
from phase1.records.journal import open_journal
from phase1.runs import MemoryRun, PerplexityRun, PipelineRun, TablesRun, ThroughputRun


def main(run: PipelineRun) -> int:
    """Run every step with the sizes of the preset; the exit status is that of the worst step (1, 2, 4, 3, then 0).

    With --resume, steps that ended are not run again, and the one that was interrupted goes on with its finished cases; a
    step that ended with an error is tried again.
    """
    journal = open_journal(Path(run.out_dir) / "phase1_pipeline.json", settings(run), machine=machine(), resume=run.resume)
    codes, failed = [], False
    for name, config in steps(run):
        print(f"\n== phase1 {name} {flags(config)}".rstrip(), flush=True)
        step = partial(_run_step, name, config)
        try:
            codes.append(step() if name == "tables" else journal.case(name, int, step))  # tables: of what the others left
        except tuple(FAILURES) as error:
            print(error_line(name, error), file=sys.stderr)
            codes.append(exit_status(error))
            failed = True
    if not failed:
        journal.close()
    print("\nplots:", *sorted(Path(run.out_dir).glob("*.png")), sep="\n  ")
    return next((code for code in (1, 2, 4, 3) if code in codes), 0)


def _run_step(name: str, config: Config) -> int:
    return int(importlib.import_module(f"phase1.commands.{name}").main(config))


def steps(run: PipelineRun) -> list[tuple[str, Config]]:
    """The commands and their configs, in order."""
    sizes = PRESETS[run.preset]
    common: dict[str, Any] = {"out_dir": run.out_dir, "baseline": run.baseline, "resume": run.resume}
    data: dict[str, Any] = {name: getattr(run, name) for name in ("dataset_name", "dataset_config", "offline")}
    checkpoints = str(Path(run.out_dir) / "checkpoints")
    return [
        ("memory", MemoryRun(**(common | sizes["memory"]))),
        ("throughput", ThroughputRun(**(common | {"save_plots": True} | sizes["throughput"]))),
        ("perplexity", PerplexityRun(**(common | data | {"checkpoint_dir": checkpoints} | sizes["perplexity"]))),
        ("tables", TablesRun(results_dir=run.out_dir, out_dir=str(Path(run.out_dir) / "tables"))),
    ]
