"""docs/results.md and what READMEs and guides show of it, made from the records that results/page.toml lists."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from phase1.records.collect import read_reports
from phase1.records.schema import Check, MemoryResult, Report, read_report
from phase1.tables import build_tables
from phase1.tables.common import hardware_of
from phase1.tables.memory import cards_comparison
from phase1.tables.rows import benchmark, rows_table
from phase1.tables.summary import summary
from phase1.tables.table import Column, Provenance, Table, markdown
from phase1.tables.targets import targets_table
from phase1.tables.your_card import your_card
from phase1.text import one_line

PAGE: Final = "docs/results.md"
LIST: Final = "results/page.toml"
READMES: Final = {"README.md": "en", "README.ja.md": "ja"}
GUIDES: Final = {"docs/benchmarking.md": "en", "docs/ja/benchmarking.md": "ja"}
HEAD: Final = """# Results

Every table here is made from the records under `results/` by `phase1 tables --results-page`; what it shows is listed in
[results/page.toml](../results/page.toml). Words are explained in the [guide](benchmarking.md), fields in the
[reference](reference.md), what was tried on the way in the [log](log.md).
"""


def generated(root: Path) -> dict[Path, str]:
    """The content of every file with generated results in the checkout at `root`: the page, both READMEs, both guides.

    Raises ValueError (one line) where `root` is no checkout of this project, or a record or a marker is missing.
    """
    if not (root / LIST).exists():
        raise ValueError(f"--results-page must run in a checkout of the project; got no {LIST} here; change to its folder")
    listed = tomllib.loads((root / LIST).read_text(encoding="utf-8"))
    files = {root / PAGE: _page(root, listed)}
    for name, language in READMES.items():
        text = (root / name).read_text(encoding="utf-8")
        text = between(text, "results", summary(root, listed["summary"], language), name)
        for screen, file in listed.get("screens", {}).items():
            shown = (root / "results" / file).read_text(encoding="utf-8")
            text = between(text, screen, f"```text\n{shown.strip()}\n```", name)
        files[root / name] = text
    for name, language in GUIDES.items():
        text = (root / name).read_text(encoding="utf-8")
        files[root / name] = between(text, "cards", your_card(list(_cards(root, listed["cards"]).values()), language), name)
    return files


def between(text: str, marker: str, content: str, name: str) -> str:
    """`text` with `content` between `<!-- MARKER: begin -->` and `<!-- MARKER: end -->`. Raises ValueError without them."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise ValueError(f"{name} must have the lines {begin} and {end}; got one or none of them; add them")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _page(root: Path, listed: dict[str, Any]) -> str:
    parts = [HEAD, "## In short\n", summary(root, listed["summary"], "en", link=False) + "\n"]
    for section in listed["section"]:
        parts += [f"## {section['title']}\n"]
        parts += [section["text"].strip() + "\n"] if "text" in section else []
        parts += [f"![{section['alt']}](../results/{section['picture']})\n"] if "picture" in section else []
        parts += [part for entry in section["table"] for part in _shown(root, entry, listed["cards"])]
    return "\n".join(parts)


def _shown(root: Path, entry: dict[str, Any], cards: list[str]) -> Iterator[str]:
    """What the list says of one table: that of the cards, of the targets in a file, or those of a record."""
    if "targets" in entry:
        targets = tomllib.loads((root / "results" / entry["targets"]).read_text(encoding="utf-8"))
        return iter([markdown(targets_table(root / "results", entry | targets))])
    return _card_table(_cards(root, cards)) if entry.get("cards") else _record(root, entry)


def _cards(root: Path, names: list[str]) -> dict[str, Report[MemoryResult]]:
    """The records of some cards, by their name below results/."""
    return {name: read_report(root / "results" / name, "memory") for name in names}


def _card_table(records: dict[str, Report[MemoryResult]]) -> Iterator[str]:
    yield markdown(cards_comparison(list(records.values())))
    for name, report in records.items():
        yield "- " + _made_by_report({"record": name}, report).removesuffix("\n")
    yield ""


def _record(root: Path, entry: dict[str, Any]) -> Iterator[str]:
    """The tables of one record, its checks, and what made it."""
    path = root / "results" / entry["record"]
    if "columns" in entry:
        content = benchmark(path)
        yield markdown(rows_table(content, entry))
        yield _made_by(entry, *_facts(content))
        return
    ((_, report),) = read_reports(path).items()
    tables = {table.name: table for table in build_tables({report.kind: report})}
    for name in entry["tables"]:
        if name not in tables:
            raise ValueError(f"{entry['record']} must allow one of {', '.join(tables)}; got {name}; correct {LIST}")
        title = f"{entry['title']}: " if "title" in entry else ""
        table = tables[name]
        of_models = tuple(text for text in table.provenance.warnings if text not in report.warnings)
        provenance = Provenance(warnings=of_models)  # the rest is below the tables, once
        yield markdown(replace(table, caption=title + _begin(table.caption, bool(title)), provenance=provenance))
    yield from _checks(report)
    yield _made_by_report(entry, report)


def _begin(caption: str, inside: bool) -> str:
    return caption[0].lower() + caption[1:] if inside else caption


def _checks(report: Report[Any]) -> Iterator[str]:
    """The checks of a report as a table, and what disturbed the run."""
    if report.checks:
        columns = (Column("Check"), Column("Value", digits=4), Column("Limit", digits=4), Column("Verdict"), Column("Detail"))
        rows = tuple((check.name, *_sides(check), check.status.upper(), check.detail) for check in report.checks)
        yield markdown(Table(name="checks", caption="", hardware="", columns=columns, rows=rows)).removeprefix("### \n\n")
    yield from (f"Warning: {one_line(text, 2000)}.\n" for text in report.warnings)


def _sides(check: Check) -> tuple[str | None, str | None]:
    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"

    return number(check.value), number(check.limit)


def _facts(content: Any) -> tuple[str, str, str, str]:
    """Command, commit, card and date of a benchmark's record, as far as it has them."""
    first = content[0] if isinstance(content, list) else content
    environment = first.get("environment", {})
    commit = environment.get("git_commit") or first.get("commit") or "not recorded"
    card = environment.get("gpu") or first.get("device") or "not recorded"
    return first.get("command", ""), str(commit), str(card), str(first.get("created_utc", ""))[:10]


def _made_by_report(entry: dict[str, Any], report: Report[Any]) -> str:
    commit = str(report.environment.get("git_commit") or "not recorded")
    return _made_by(entry, report.command, commit, hardware_of(report), report.created_utc[:10])


def _made_by(entry: dict[str, Any], command: str, commit: str, card: str, date: str) -> str:
    command = one_line(command or entry.get("command", ""), 2000).replace("`", "'")
    commit = re.sub(r"^([0-9a-f]{9})[0-9a-f]{31}", r"\1", commit)
    facts = [f"commit {commit}", card, *([date] if date else []), f"[record](../results/{entry['record']})"]
    return f"Made by {f'`{command}`' if command else 'a command that was not recorded'}; {', '.join(facts)}.\n"
