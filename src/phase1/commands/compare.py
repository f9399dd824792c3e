"""`phase1 compare`: two runs against each other, as a gate for regressions. Reads result files alone."""

from collections import Counter

from phase1.checks.regression import METRICS, Difference, Outcome, Rule, differences, parse_rules
from phase1.records.collect import reports_at
from phase1.runs import CompareRun
from phase1.tables.grid import grid
from phase1.tables.screen import Screen
from phase1.tables.screen import text as screen_text
from phase1.text import one_line

MOST = 10  # changes on the last screen
HEADINGS = ("model", "metric", "T", "old", "new", "change %", "limit", "result")
UNITS = {"peak": "peak (bytes)"}
EXIT = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


def main(run: CompareRun) -> int:
    """Print every difference and the verdict of every rule: 0 all pass (or no rule), 1 one fails, 3 one compares nothing.

    Raises ValueError for a malformed rule, and for files that are missing, corrupt, foreign or of no common kind.
    """
    rules = [] if run.fail_on is None else parse_rules(run.fail_on)
    old, new = reports_at(run.old), reports_at(run.new)
    if not old.keys() & new.keys():
        kinds = f"{' and '.join(old)} in OLD, {' and '.join(new)} in NEW"
        raise ValueError(f"OLD and NEW must hold reports of one kind; got {kinds}; give two runs of the same command")
    found = differences(old, new)
    verdicts = [verdict(rule, found) for rule in rules]
    if run.verbose:
        print(table(found, rules), *map(reason_line, (d for d in found if d.reason)), "", sep="\n")
    print(screen_text(screen(run, found, rules, verdicts)))
    words = [word for word, _ in verdicts]
    return EXIT[next((word for word in ("FAIL", "INCONCLUSIVE") if word in words), "PASS")]


def screen(run: CompareRun, found: list[Difference], rules: list[Rule], verdicts: list[tuple[str, str]]) -> Screen:
    """The verdict of every rule, the numbers past a limit, the largest changes, and what cannot be compared, counted."""
    broken = [d for d in found if any(d.metric == rule.metric and d.outcome(rule) == "FAIL" for rule in rules)]
    known = sorted((d for d in found if d.change_percent is not None), key=lambda d: -abs(d.change_percent or 0))
    shown = [*broken, *(d for d in known if d not in broken)][:MOST]
    reasons = Counter((d.metric, d.reason) for d in found if d.reason and d not in broken)
    lines = [change_line(d) for d in shown]
    if len(known) + len(broken) > len(shown):
        lines.append(f"... and {len({*map(id, known), *map(id, broken)}) - len(shown)} more numbers: --verbose")
    lines += [f"not comparable: {count} x {metric}, {why}"[:150] for (metric, why), count in reasons.most_common(4)]
    answers = [f"{rule}: {word} ({detail})" for rule, (word, detail) in zip(rules, verdicts)]
    return Screen(
        question=f"What changed from {run.old} to {run.new}, and does it break a limit?",
        numbers=lines or ["no number is in both"],
        answer="; ".join(answers) or f"{len(known)} numbers compared, no limit given (--fail-on peak:+2%)",
    )


def change_line(difference: Difference) -> str:
    """One number in both runs."""
    if difference.change_percent is None:
        return reason_line(difference)
    where = "" if difference.seq_length is None else f" at T = {difference.seq_length:,}"
    name = f"{difference.model}, {UNITS.get(difference.metric, difference.metric)}{where}"
    numbers = " -> ".join(_number(difference.metric, value) for value in (difference.old, difference.new))
    return one_line(f"{name:<58} {difference.change_percent:>+9.2f} %   {numbers}")


def reason_line(difference: Difference) -> str:
    """Why a number is in no comparison."""
    where = "" if difference.seq_length is None else f" at T = {difference.seq_length}"
    word = "lost" if difference.lost else "not comparable"
    return one_line(f"- {word}: {difference.metric} of {difference.model}{where}: {difference.reason}")


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
