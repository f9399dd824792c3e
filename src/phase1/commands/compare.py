"""`phase1 compare`: two runs against each other, as a gate for regressions. Reads result files alone."""

from pathlib import Path
from typing import Any

from phase1.checks.regression import METRICS, Difference, Outcome, Rule, differences, parse_rules
from phase1.files import read_json
from phase1.records.schema import FILES, Kind, Report, read_report
from phase1.runs import CompareRun
from phase1.tables.grid import grid
from phase1.text import one_line

KINDS: tuple[Kind, ...] = ("memory", "throughput", "perplexity")
HEADINGS = ("model", "metric", "T", "old", "new", "change %", "limit", "result")
UNITS = {"peak": "peak (bytes)"}
EXIT = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


def main(run: CompareRun) -> int:
    """Print every difference and the verdict of every rule: 0 all pass (or no rule), 1 one fails, 3 one compares nothing.

    Raises ValueError for a malformed rule, and for files that are missing, corrupt, foreign or of no common kind.
    """
    rules = [] if run.fail_on is None else parse_rules(run.fail_on)
    old, new = read_reports(Path(run.old)), read_reports(Path(run.new))
    if not old.keys() & new.keys():
        kinds = f"{' and '.join(old)} in OLD, {' and '.join(new)} in NEW"
        raise ValueError(f"OLD and NEW must hold reports of one kind; got {kinds}; give two runs of the same command")
    found = differences(old, new)
    print(table(found, rules))
    for difference in found:
        if difference.reason:
            where = "" if difference.seq_length is None else f" at T = {difference.seq_length}"
            word = "lost" if difference.lost else "not comparable"
            print(one_line(f"- {word}: {difference.metric} of {difference.model}{where}: {difference.reason}"))
    verdicts = [verdict(rule, found) for rule in rules]
    for rule, (word, detail) in zip(rules, verdicts):
        print(f"{rule}: {word} ({detail})")
    words = [word for word, _ in verdicts]
    return EXIT[next((word for word in ("FAIL", "INCONCLUSIVE") if word in words), "PASS")]


def verdict(rule: Rule, found: list[Difference]) -> tuple[str, str]:
    """PASS, FAIL or INCONCLUSIVE, and of how many numbers."""
    outcomes: list[Outcome] = [d.outcome(rule) for d in found if d.metric == rule.metric]
    failed, decided = outcomes.count("FAIL"), len(outcomes) - outcomes.count("n/a")
    if not decided:
        return "INCONCLUSIVE", f"nothing to compare; it needs a {METRICS[rule.metric]} report of the same model in OLD and NEW"
    detail = f"{failed} of {decided} past the limit" + (f", {len(outcomes) - decided} n/a" if decided < len(outcomes) else "")
    return ("FAIL" if failed else "PASS"), detail


def table(found: list[Difference], rules: list[Rule]) -> str:
    """A row for every number, and one for each rule where a metric has two."""
    rows = []
    for difference in found:
        of_metric: list[Rule | None] = [rule for rule in rules if rule.metric == difference.metric]
        for rule in of_metric or [None]:
            change = difference.change_percent
            rows.append(
                (
                    difference.model,
                    UNITS.get(difference.metric, difference.metric),
                    "n/a" if difference.seq_length is None else str(difference.seq_length),
                    _number(difference.metric, difference.old),
                    _number(difference.metric, difference.new),
                    "n/a" if change is None else f"{change:+.2f}",
                    rule.limit if rule else "",
                    difference.outcome(rule) if rule else "n/a" if difference.reason else "",
                )
            )
    return grid(HEADINGS, rows, [False, False, *[True] * 5, False])


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if metric == "perplexity" else f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"


def read_reports(path: Path) -> dict[str, Report[Any]]:
    """The report at `path`, or those in the folder `path`, by kind; ValueError where there is none."""
    if not path.is_dir():
        kind = _kind(path)
        return {kind: read_report(path, kind)}
    paths = {kind: path / FILES[kind] for kind in KINDS}
    reports: dict[str, Report[Any]] = {kind: read_report(file, kind) for kind, file in paths.items() if file.exists()}
    if not reports:
        expected = f"expected a folder with {' or '.join(FILES.values())}"
        raise ValueError(f"{one_line(path)}: {expected}; got none of them; give the --out-dir of a run")
    return reports


def _kind(path: Path) -> Kind:
    """What the file says it is."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: expected a phase1 report; got {one_line(error)}; give a result file") from error
    named = content.get("kind") if isinstance(content, dict) else None
    for kind in KINDS:
        if named == kind:
            return kind
    raise ValueError(f"{one_line(path)}: expected a phase1 report; got the file of another program; give a result file")
