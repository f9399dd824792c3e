"""The page: verdicts first, then each report's plots and tables, the trainings, what changed, and how to repeat it all."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from phase1.checks.regression import Difference
from phase1.errors import reason
from phase1.page.html import Html, download, folded, joined, lines, plot, table, tag
from phase1.page.words import Words, claim_in, english, japanese
from phase1.plots import plot_training, plots_of
from phase1.records.collect import KINDS
from phase1.records.schema import Check, Report
from phase1.tables import Column, Table, build_tables, render
from phase1.tables.common import basis_of, hardware_of
from phase1.tables.screen import values_of
from phase1.tables.training import Training, training_comparison, training_tables

SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}  # no status by its colour alone
ORDER = ("fail", "inconclusive", "pass")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    reports: Mapping[str, Report[Any]],
    trainings: Sequence[Training] = (),
    changes: Sequence[Difference] | None = None,
    *,
    title: str,
    language: str = "en",
    files_of: Mapping[str, bytes] | None = None,
    elsewhere: Sequence[str] = (),
) -> str:
    """One HTML file of a folder's results, the same bytes for the same results.

    Args:
        reports: by kind, of any subset of the kinds.
        changes: against an earlier run, or None.
        title: what the results are of, such as their folder.
        language: en or ja: of the page's own words, not of what records say.
        files_of: the content of the result files by name, for a reader to save.
        elsewhere: folders below with results that are not on this page.
    """
    words = japanese if language == "ja" else english
    sections: dict[str, Html] = {
        "verdicts": _verdicts(reports, words, language),
        "warnings": _warnings(reports, words),
        **{str(kind): _of_kind(reports[kind], kind, words) for kind in KINDS if kind in reports},
        "training": _trainings(trainings, words),
        "changes": joined() if changes is None else _changes(changes, words),
        "environment": table(environment_table(reports, words)) if reports else joined(),
        "commands": _commands(reports, words),
        "data": _data(reports, trainings, changes, files_of or {}, elsewhere, words),
    }
    shown = {key: content for key, content in sections.items() if content}
    links = tag("nav", *(tag("a", _title(words(key)), href=f"#{key}") for key in shown))
    body = [tag("section", tag("h2", _title(words(key))), content, id=key) for key, content in shown.items()]
    missing = [f"{words(kind)} (phase1 {kind})" for kind in KINDS if reports and kind not in reports]
    head = [
        tag("p", words("report"), class_="kind"),
        tag("h1", title),
        _answer(reports, words),
        *(tag("p", text) for text in _machines(reports, words)),
        *([tag("p", f"{words('missing')}: {', '.join(missing)}", class_="missing")] if missing else []),
    ]
    style = files("phase1.page").joinpath("style.css").read_text("utf-8")
    return (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title, ': ', words('report'))}\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join([tag("header", *head), links, tag("main", *body)])
        + "\n</body>\n</html>\n"
    )


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _answer(reports: Mapping[str, Report[Any]], words: Words) -> Html:
    """One verdict over all checks: the worst of them. Nothing where there are no reports."""
    if not reports:
        return joined()
    statuses = [check.status for report in reports.values() for check in report.checks]
    if not statuses:
        return tag("p", words("no checks"), class_="answer")
    counts = {status: sum(found == status for found in statuses) for status in ORDER}
    worst = next(status for status in ORDER if counts[status])
    said = [words("{} of {} checks pass").format(counts["pass"], len(statuses))]
    others = {"{} failed": counts["fail"], "{} undecided": counts["inconclusive"]}
    said += [words(name).format(count) for name, count in others.items() if count]
    return tag("p", _badge(worst, words), Html(" "), words(", ").join(said), class_="answer")


def _badge(status: str, words: Words) -> Html:
    word = words(status)
    return tag("b", f"{SIGNS[status]} {word.upper()}", class_=f"badge {status}")


def _machines(reports: Mapping[str, Report[Any]], words: Words) -> list[str]:
    """Hardware and basis, once for all reports that share them."""
    kinds: dict[str, list[str]] = {}
    for kind, report in reports.items():
        basis = _named(basis_of(report.results.values()).split(", "), words)
        kinds.setdefault(f"{hardware_of(report)} ({basis})", []).append(kind)
    return [what if len(kinds) == 1 else f"{_named(of, words)}: {what}" for what, of in kinds.items()]


def _named(keys: Iterable[str], words: Words) -> str:
    return words(", ").join(words(key) for key in keys)


def _verdicts(reports: Mapping[str, Report[Any]], words: Words, language: str) -> Html:
    checks = [check for report in reports.values() for check in report.checks]
    if not checks:
        return joined()
    titles = [tag("th", _title(words(key)), scope="col") for key in ("verdict", "check", "value", "limit", "why")]
    rows = [_verdict(check, words, language) for check in sorted(checks, key=lambda check: ORDER.index(check.status))]
    return tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *rows), class_="verdicts")


def verdicts_table(reports: Mapping[str, Report[Any]]) -> Table:
    """Every check with its numbers as they are recorded, in the unit that its reason names."""
    columns = (Column("Report"), Column("Check"), Column("Verdict"), Column("Value"), Column("Limit"), Column("Why"))
    rows = tuple(
        (kind, check.name, check.status, check.value, check.limit, check.detail)
        for kind, report in reports.items()
        for check in report.checks
    )
    return Table("verdicts", "Verdicts", "", columns, rows)


def _verdict(check: Check, words: Words, language: str) -> Html:
    value, limit = values_of(check)
    limit = limit.removeprefix("limit ").replace("over ", "> ")
    cells = [_badge(check.status, words), tag("span", claim_in(language, check.name)), value, limit, check.detail]
    css = ("", "claim", "value", "limit", "why")
    return tag("tr", *(tag("td", cell, class_=c) for cell, c in zip(cells, css)), data_check=check.name)


def _warnings(reports: Mapping[str, Report[Any]], words: Words) -> Html:
    found = [f"{words(kind)}: {warning}" for kind, report in reports.items() for warning in report.warnings]
    return tag("ul", *(tag("li", text) for text in found)) if found else joined()


def _of_kind(report: Report[Any], kind: str, words: Words) -> Html:
    """The plots of a report and every table of it alone; the first table is open."""
    plots = [_drawn(draw, report, f"{kind}{i}", words) for i, draw in enumerate(plots_of(report))]
    tables = build_tables({kind: report})[:-1]
    first, *others = [tag("div", tag("h3", made.caption), table(made), _notes(made), class_="table") for made in tables]
    return joined(first, *plots, *(folded(made.caption, content) for made, content in zip(tables[1:], others)))


def _drawn(draw: Any, content: Any, name: str, words: Words) -> Html:
    """A plot, or why there is none: it costs nothing that was measured."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            svg = draw(content, Path(folder) / "plot.svg").read_text("utf-8")
    except Exception as error:
        return tag("p", f"{words('no plot')}: {type(error).__name__}: {reason(error)}", class_="missing")
    return plot(svg, name, f"{words(name.rstrip('0123456789'))}: {words('a plot of numbers in the tables')}")


def _notes(made: Table) -> Html:
    return tag("ul", *(tag("li", note) for note in made.notes), class_="notes") if made.notes else joined()


def _trainings(trainings: Sequence[Training], words: Words) -> Html:
    shown = [training for training in trainings if training.rows]
    if not shown:
        return joined()
    texts = [
        folded(f"{words(key)}: {training.name}", tag("pre", lines(text)))
        for training in shown
        for key, text in (("samples", training.samples), ("settings", training.settings))
        if text
    ]
    drawn = _drawn(plot_training, {training.name: training.rows for training in shown}, "training", words)
    made = training_comparison(shown)
    return joined(drawn, table(made), _notes(made), *texts)


def changes_table(changes: Sequence[Difference], words: Words) -> Table:
    """Every number that is in both runs, and why others are not compared."""
    model, metric, old, new, change = (_title(words(key)) for key in ("model", "metric", "old", "new", "change"))
    columns = (Column(model), Column(metric), Column("T", "tokens"), Column(old), Column(new), Column(change, "%"))
    rows = tuple((d.model, d.metric, d.seq_length, d.old, d.new, d.change_percent) for d in changes if not d.reason)
    notes = tuple(dict.fromkeys(f"{d.model}, {d.metric}: {d.reason}" for d in changes if d.reason))
    return Table("changes", _title(words("changes")), "", columns, rows, notes)


def _changes(changes: Sequence[Difference], words: Words) -> Html:
    made = changes_table(changes, words)
    notes = [folded(f"{words('notes')}: {len(made.notes)}", _notes(made))] if made.notes else []
    return joined(*([table(made)] if made.rows else []), *notes) or tag("p", words("nothing in common"))


def environment_table(reports: Mapping[str, Report[Any]], words: Words) -> Table:
    """A row for each fact; a column for all reports where every report has the same facts."""
    facts = {kind: report.environment for kind, report in reports.items()}
    shared = len({tuple(sorted(fact.items(), key=str)) for fact in facts.values()}) == 1
    columns = {_named(facts, words): next(iter(facts.values()))} if shared else {words(kind): facts[kind] for kind in facts}
    names = dict.fromkeys(name for fact in facts.values() for name in fact)
    rows = tuple((name, *(_fact(name, fact.get(name)) for fact in columns.values())) for name in names)
    headings = [words("fact"), *columns]
    return Table("environment", _title(words("environment")), "", tuple(Column(_title(text)) for text in headings), rows)


def _fact(name: str, value: Any) -> str | None:
    if value is None:
        return None
    return f"{value / 1e9:,.1f} GB" if name.endswith("_bytes") and not isinstance(value, str) else str(value)


def _commands(reports: Mapping[str, Report[Any]], words: Words) -> Html:
    return joined(
        *(
            tag("div", tag("pre", lines(report.command)), tag("p", f"{words('written')}: {report.created_utc}", class_="made"))
            for report in reports.values()
        )
    )


def _data(
    reports: Mapping[str, Report[Any]],
    trainings: Sequence[Training],
    changes: Sequence[Difference] | None,
    results: Mapping[str, bytes],
    elsewhere: Sequence[str],
    words: Words,
) -> Html:
    """The table that joins all reports, then every table and file to save; files are in English, whatever the page is in."""
    tables = build_tables(reports) if reports else []
    tables += training_tables(trainings)
    tables += [changes_table(changes, english)] if changes else []
    tables += [verdicts_table(reports), environment_table(reports, english)] if reports else []
    links = [download(f"{made.name}.csv", "text/csv", render(made, "csv").encode()) for made in tables]
    links += [download(name, "application/json", content) for name, content in results.items()]
    joint = [tag("div", tag("h3", made.caption), table(made)) for made in tables if made.name == "configuration_comparison"]
    further = [tag("p", f"{words('also')}: {', '.join(elsewhere)}", class_="missing")] if elsewhere else []
    said = tag("p", _title(words("every table as CSV, every result file as JSON")))
    return joined(*joint, said, tag("ul", *(tag("li", link) for link in links), class_="files"), *further)
