"""Prints a Markdown table of what run.sh has measured: python examples/peers/table.py OUT"""

import sys
from pathlib import Path

from phase1.records.schema import FILES, read_report

SPEED_OF = {"ar_ssm_dense_no_copy": "ar_ssm", "transformer_start": "baseline_fast", "gated_delta": None}
"""What a model of a perplexity report is called where its speed was measured; the same by default."""


def main(out: Path) -> None:
    reports = [read_report(path, "perplexity") for path in sorted(out.glob(f"*/**/{FILES['perplexity']}"))]
    texts = list(dict.fromkeys(r.dataset.name for report in reports for r in report.results.values() if r.dataset))
    speeds = out / "speed" / FILES["throughput"]
    speed = read_report(speeds, "throughput").results if speeds.exists() else {}
    rows: dict[str, dict] = {}
    for report in reports:
        for key, result in report.results.items():
            row = rows.setdefault(key, {"result": result, "scores": {}})
            if result.dataset:
                row["scores"][result.dataset.name] = result.perplexity
    titles = ["model", "parameters", "of them in mixers", *(f"perplexity, {text}" for text in texts), "tokens/s", "peak, GB"]
    print("| " + " | ".join(titles) + " |\n|---|" + "---:|" * (len(titles) - 1))
    for key, row in rows.items():
        result, scores = row["result"], row["scores"]
        if result.status != "ok":
            print(f"| {key} | refused: {result.detail}" + " |" * (len(titles) - 1))
            continue
        timed = speed.get(SPEED_OF.get(key, key))
        best = next((m for m in timed.measurements if m.status == "ok"), None) if timed else None
        cells = [f"{result.parameters.total:,}", f"{result.parameters.mixer:,}" if result.parameters.mixer else "-"]
        cells += [f"{scores[text]:.2f}" if text in scores else "-" for text in texts]
        cells += [f"{best.tokens_per_second:,.0f}" if best else "-"]
        cells += [f"{best.peak_allocated_bytes / 1e9:.2f}" if best and best.peak_allocated_bytes else "-"]
        print(f"| {key} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
