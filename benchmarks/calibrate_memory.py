"""Estimates of peak memory against one GPU: memory_calibration.json and .md, exit status 0 pass, 1 fail, 3 undecided."""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from phase1.files import atomic_write
from phase1.machine.environment import current_command, environment
from phase1.measure.memory.calibrate import MEDIAN_LIMIT, WORST_LIMIT, Calibration, calibrate, calibration_cases, judge
from phase1.tables import Column, Table, render
from phase1.tables.console import console

COLUMNS = (
    Column("Configuration"),
    Column("Detail"),
    Column("Measured", "bytes"),
    Column("Estimated", "bytes"),
    Column("Error", "%"),
    Column("Error of reserved", "%"),
    Column("Unattributed", "%"),
    Column("Peak in"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", default="results/benchmarks", help="folder of the two files (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes on the GPU at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("calibrate_memory: error: expected a CUDA device; found none; run it on a machine with a GPU", file=sys.stderr)
        return 3
    cases = calibration_cases()
    result = judge(list(tqdm(calibrate(cases, options.workers), total=len(cases), unit="case", disable=None)))
    facts = environment()
    table = table_of(result, str(facts["gpu"]))
    record = {"environment": facts, "command": current_command()} | result.as_json()
    folder = Path(options.out_dir)
    atomic_write(folder / "memory_calibration.json", (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    atomic_write(folder / "memory_calibration.md", render(table, "markdown").encode())
    print(console(table))
    return {"pass": 0, "fail": 1, "inconclusive": 3}[result.verdict]


def table_of(result: Calibration, hardware: str) -> Table:
    """One row per configuration, the verdict in the notes."""
    numbers = (result.median_percent, result.worst_percent)
    median, worst = ("n/a" if number is None else f"{number:.2f} %" for number in numbers)
    limits = f"limits {MEDIAN_LIMIT:g} and {WORST_LIMIT:g} %"
    verdict = f"{result.verdict.upper()}: median error of the allocated peak {median}, worst {worst}; {limits}"
    rows = tuple(
        (row.name, row.detail, row.measured_bytes, row.estimated_bytes)
        + (row.error_percent, row.reserved_error_percent, row.unattributed_percent, row.peak_phase)
        for row in result.rows
    )
    caption = f"Estimated against measured peak memory: {hardware}"
    return Table("memory_calibration", caption, hardware, COLUMNS, rows, (verdict,))


if __name__ == "__main__":
    sys.exit(main())
