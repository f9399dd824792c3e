"""docs/results.md and what READMEs and guides show of it, made from the records that results/page.toml lists."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict, get_type_hints

from phase1.records.collect import reports_at
from phase1.records.schema import Check, Kind, MemoryResult, Report, read_report
from phase1.tables import build_tables
from phase1.tables.common import hardware_of
from phase1.tables.memory import cards_comparison
from phase1.tables.rows import RowsEntry, benchmark, check, rows_table, value_at
from phase1.tables.summary import summary
from phase1.tables.table import Column, Provenance, Table, markdown
from phase1.tables.targets import Targets, targets_table
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


class TargetsEntry(TypedDict):
    """What the list says of a table of targets."""

    targets: str
    name: str
    caption: str


class CardsEntry(TypedDict):
    """What the list says of the table of its cards."""

    cards: bool


class ReportEntry(TypedDict):
    """What the list says of the tables of a report."""

    record: str
    tables: list[str]
    title: NotRequired[str]
    command: NotRequired[str]


class Section(TypedDict):
    """A heading and what is below it; a picture has an `alt`."""

    title: str
    text: NotRequired[str]
    picture: NotRequired[str]
    alt: NotRequired[str]
    table: list[dict[str, object]]  # each of ENTRIES


class Summary(TypedDict):
    """The records of the first table; see `summary`."""

    memory: str
    speed: str
    linear: str
    perplexity: str


class Listed(TypedDict):
    """The whole list."""

    cards: list[str]
    summary: Summary
    screens: NotRequired[dict[str, str]]
    section: list[Section]


class Step(TypedDict):
    """What the first table needs of a row of a record of benchmarks/steps.py."""

    role: str
    settings: dict[str, object]
    seq_length: int
    tokens_per_s: float


ENTRIES: Final = {"targets": TargetsEntry, "cards": CardsEntry, "columns": RowsEntry, "tables": ReportEntry}  # by a key of each
REPORTS: Final[dict[str, Kind]] = {"memory": "memory", "linear": "throughput", "perplexity": "perplexity"}  # of the summary


def generated(root: Path) -> dict[Path, str]:
    """The content of every file with generated results in the checkout at `root`: the page, both READMEs, both guides.

    Raises ValueError (one line that names the file) where `root` is no checkout of this project; a file that the list names, or
    a marker, is missing; or the list, the targets or a record is damaged.
    """
    if not (root / LIST).exists():
        raise ValueError(f"--results-page must run in a checkout of the project; got no {LIST} here; change to its folder")
    listed = _list(root)
    _check_summary(root, listed["summary"])
    files = {root / PAGE: _page(root, listed)}
    for name, language in READMES.items():
        text = between(_text(root / name), "results", _summary(root, listed["summary"], language), name)
        for screen, file in listed.get("screens", {}).items():
            text = between(text, screen, f"```text\n{_text(_named(root, file)).strip()}\n```", name)
        files[root / name] = text
    for name, language in GUIDES.items():
        cards = your_card(list(_cards(root, listed["cards"]).values()), language)
        files[root / name] = between(_text(root / name), "cards", cards, name)
    return files


def _list(root: Path) -> dict[str, Any]:
    """The list, of whose keys and types no error is left."""
    listed = _toml(root / LIST)
    check(listed, Listed, LIST)
    for number, section in enumerate(listed["section"], 1):
        where = f"{LIST}, section {number}"
        if ("picture" in section) != ("alt" in section):
            raise ValueError(f"{where}: expected picture and alt, or none of them; got one; add the other")
        for place, entry in enumerate(section["table"], 1):
            kind = next((kind for key, kind in ENTRIES.items() if key in entry), None)
            if kind is None:
                near = next((f"; did you mean {near}?" for key in entry for near in get_close_matches(key, ENTRIES, 1)), "")
                raise ValueError(f"{where}, table {place}: expected {' or '.join(ENTRIES)}; got {', '.join(entry)}{near}")
            check(entry, kind, f"{where}, table {place}")
    return listed


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{one_line(path)}: expected TOML; got {one_line(error)}; correct it") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{one_line(path)}: expected a text file in UTF-8; got {one_line(got)}; restore it") from error


def _named(root: Path, name: str) -> Path:
    """The file that the list calls `name`; ValueError where it is not there."""
    path = root / "results" / name
    if not path.is_file():
        expected = f"expected the file results/{one_line(name)}, which it names"
        raise ValueError(f"{LIST}: {expected}; got none, it is missing; make it, or correct its name")
    return path


def _check_summary(root: Path, listed: dict[str, str]) -> None:
    """Raise ValueError for a record of the first table that is not there, is no report of its kind, or has text as a speed."""
    for row, kind in REPORTS.items():
        read_report(_named(root, listed[row]), kind)
    path = _named(root, listed["speed"])
    content = benchmark(path)
    if isinstance(content, dict) and "kind" in content:
        read_report(path, "throughput")
        return
    rows = value_at(content, "" if isinstance(content, list) else "rows", f"results/{listed['speed']}")
    check(rows, list[dict], f"results/{listed['speed']}, row")
    for number, row in enumerate(rows, 1):
        needed = {key: row[key] for key in get_type_hints(Step) if key in row}
        check(needed, Step, f"results/{listed['speed']}, row {number}")


def between(text: str, marker: str, content: str, name: str) -> str:
    """`text` with `content` between `<!-- MARKER: begin -->` and `<!-- MARKER: end -->`. Raises ValueError without them."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise ValueError(f"{name} must have the lines {begin} and {end}; got one or none of them; add them")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _summary(root: Path, listed: dict[str, str], language: str, link: bool = True) -> str:
    """The first table; ValueError where its records, each sound, lack a model or a number, or have no length in common."""
    try:
        return summary(root, listed, language, link)
    except (LookupError, StopIteration, TypeError) as error:
        expected = f"{LIST}, summary: expected records of all models of the first table, at the same lengths"
        raise ValueError(f"{expected}; got others ({one_line(repr(error))}); name other records") from error


def _page(root: Path, listed: dict[str, Any]) -> str:
    parts = [HEAD, "## In short\n", _summary(root, listed["summary"], "en", link=False) + "\n"]
    for section in listed["section"]:
        parts += [f"## {section['title']}\n"]
        parts += [section["text"].strip() + "\n"] if "text" in section else []
        if "picture" in section:
            _named(root, section["picture"])
            parts += [f"![{section['alt']}](../results/{section['picture']})\n"]
        parts += [part for entry in section["table"] for part in _shown(root, entry, listed["cards"])]
    return "\n".join(parts)


def _shown(root: Path, entry: dict[str, Any], cards: list[str]) -> Iterator[str]:
    """What the list says of one table: that of the cards, of the targets in a file, or those of a record."""
    if "targets" in entry:
        file = f"results/{entry['targets']}"
        targets = _toml(_named(root, entry["targets"]))
        check(targets, Targets, file)
        return iter([markdown(targets_table(root / "results", entry | targets, file))])
    if "cards" in entry:
        return _card_table(_cards(root, cards)) if entry["cards"] else iter(())
    return _record(root, entry)


def _cards(root: Path, names: list[str]) -> dict[str, Report[MemoryResult]]:
    """The records of some cards, by their name below results/."""
    reports = {name: read_report(_named(root, name), "memory") for name in names}
    for name, report in reports.items():
        if not all(map(report.run.get, ("card", "card_name", "seq_length"))):
            expected = "expected a report of phase1 memory --card NAME --fit"
            raise ValueError(f"{LIST}, cards: {expected}; got another, {one_line(name)}; correct the list")
    if not reports:
        raise ValueError(f"{LIST}, cards: expected records of phase1 memory --card NAME --fit; got none; name them")
    return reports


def _card_table(records: dict[str, Report[MemoryResult]]) -> Iterator[str]:
    yield markdown(cards_comparison(list(records.values())))
    for name, report in records.items():
        yield "- " + _made_by_report({"record": name}, report).removesuffix("\n")
    yield ""


def _record(root: Path, entry: dict[str, Any]) -> Iterator[str]:
    """The tables of one record, its checks, and what made it."""
    path = _named(root, entry["record"])
    if "columns" in entry:
        content = benchmark(path)
        yield markdown(rows_table(content, entry))
        yield _made_by(entry, *_facts(content))
        return
    ((_, report),) = reports_at(str(path)).items()
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

    def said(key: str) -> str:
        return str(value_at(first, key, "", optional=True) or "")

    commit = said("environment.git_commit") or said("commit") or "not recorded"
    card = said("environment.gpu") or said("device") or "not recorded"
    return said("command"), commit, card, said("created_utc")[:10]


def _made_by_report(entry: dict[str, Any], report: Report[Any]) -> str:
    commit = str(report.environment.get("git_commit") or "not recorded")
    return _made_by(entry, report.command, commit, hardware_of(report), report.created_utc[:10])


def _made_by(entry: dict[str, Any], command: str, commit: str, card: str, date: str) -> str:
    command = one_line(command or entry.get("command", ""), 2000).replace("`", "'")
    commit = re.sub(r"^([0-9a-f]{9})[0-9a-f]{31}", r"\1", commit)
    facts = [f"commit {commit}", card, *([date] if date else []), f"[record](../results/{entry['record']})"]
    return f"Made by {f'`{command}`' if command else 'a command that was not recorded'}; {', '.join(facts)}.\n"
