"""`phase1 pipeline`: the four scripts one after the other; a step that fails does not stop the next."""

import importlib
import sys
from pathlib import Path
from typing import Any

from phase1.config import PRESETS, Config, MemoryRun, PerplexityRun, PipelineRun, TablesRun, ThroughputRun, flags
from phase1.errors import FAILURES, exit_status


def main(run: PipelineRun) -> int:
    """Run every step with the sizes of the preset; the exit status is that of the worst step (1, 2, 4, 3, then 0)."""
    codes = []
    for name, config in steps(run):
        print(f"\n== phase1 {name} {flags(config)}".rstrip(), flush=True)
        try:
            codes.append(importlib.import_module(f"phase1.commands.{name}").main(config))
        except tuple(FAILURES) as error:
            print(f"phase1 {name}: error: {error}", file=sys.stderr)
            codes.append(exit_status(error))
    print("\nplots:", *sorted(Path(run.out_dir).glob("*.png")), sep="\n  ")
    return next((code for code in (1, 2, 4, 3) if code in codes), 0)


def steps(run: PipelineRun) -> list[tuple[str, Config]]:
    """The commands and their configs, in order."""
    sizes = PRESETS[run.preset]
    common: dict[str, Any] = {"out_dir": run.out_dir, "baseline": run.baseline}
    data: dict[str, Any] = {"dataset_name": run.dataset_name, "dataset_config": run.dataset_config}
    checkpoints = str(Path(run.out_dir) / "checkpoints")
    return [
        ("memory", MemoryRun(**(common | sizes["memory"]))),
        ("throughput", ThroughputRun(**(common | {"save_plots": True} | sizes["throughput"]))),
        ("perplexity", PerplexityRun(**(common | data | {"checkpoint_dir": checkpoints} | sizes["perplexity"]))),
        ("tables", TablesRun(results_dir=run.out_dir, out_dir=str(Path(run.out_dir) / "tables"))),
    ]
