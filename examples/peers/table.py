"""What run.sh has measured, as Markdown and in OUT/peers.json: python examples/peers/table.py OUT"""

import json
import sys
from pathlib import Path
from typing import Any

from phase1.files import atomic_write
from phase1.records.schema import FILES, read_report

SPEED_OF = {"ar_ssm_dense_no_copy": "ar_ssm", "transformer_start": "transformer"}
"""The folder of the speed of a model of a perplexity report; that of its name by default."""


def measured(out: Path) -> dict[str, Any]:
    """The record: of each model parameters, perplexity of every text, tokens/s and peak memory of a step of 64 texts of 512
    tokens. What OUT has no report of stays as OUT/peers.json has it."""
    file = out / "peers.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    record["command"] = "bash examples/peers/run.sh OUT DATA STEP..."
    rows: dict[str, dict[str, Any]] = {row["model"]: row for row in record["rows"]}
    for path in sorted(out.glob(f"*/**/{FILES['perplexity']}")):
        report = read_report(path, "perplexity")
        record["environment"] = report.environment
        for key, result in report.results.items():
            if result.status != "ok":
                rows.setdefault(key, {"model": key, "refused": result.detail})
                continue
            row = rows.setdefault(key, {"model": key})
            row |= {"parameters": result.parameters.total, "mixer_parameters": result.parameters.mixer or None}
            row |= {"trained_tokens": result.trained_tokens, "weights_sha256": result.weights_sha256}
            if result.dataset:
                row[f"perplexity_{result.dataset.name}"] = result.perplexity
    for key, row in rows.items():
        file = out / "speed" / SPEED_OF.get(key, key) / FILES["throughput"]
        timed = read_report(file, "throughput").results["phase1"] if file.exists() else None
        best = next((m for m in timed.measurements if m.status == "ok"), None) if timed else None
        if best is not None:
            row |= {"tokens_per_s": best.tokens_per_second, "peak_bytes": best.peak_allocated_bytes}
    return record | {"rows": list(rows.values())}


def main(out: Path) -> None:
    record = measured(out)
    rows = record["rows"]
    atomic_write(out / "peers.json", json.dumps(record, indent=1).encode())
    texts = list(dict.fromkeys(name for row in rows for name in row if name.startswith("perplexity_")))
    names = ["model", "parameters", "mixer_parameters", *texts, "tokens_per_s", "peak_bytes"]
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |\n|---|" + "---:|" * (len(names) - 1))
    for row in rows:
        cells = [f"{row['model']}: refused, {row['refused']}" if "refused" in row else row["model"]]
        numbers = {name: row.get(name) for name in names[1:]}
        cells += ["-" if n is None else f"{n:,.{2 if name in texts else 0}f}" for name, n in numbers.items()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
