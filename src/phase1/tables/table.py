"""A table, and its forms in files. Cells may hold names from files, so every form escapes what it would interpret."""

import csv
import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from phase1.text import one_line


class Interval(NamedTuple):
    """Both ends of an interval: one cell for people, two columns in CSV."""

    low: float
    high: float

    @classmethod
    def of(cls, ends: tuple[float, float] | None) -> "Interval | None":
        """That of a record, which may have none."""
        return None if ends is None else cls(*ends)


Cell = str | float | int | Interval | None  # None: not measured, not applicable
MISSING = "n/a"


@dataclass(frozen=True)
class Column:
    """A heading with its unit, and how its numbers are rounded where people read them (CSV has them in full).

    console: false for a column that only the files have. interval: whether its cells are intervals.
    """

    title: str
    unit: str = ""
    digits: int = 2
    console: bool = True
    interval: bool = False

    @property
    def heading(self) -> str:
        return one_line(f"{self.title} ({self.unit})" if self.unit else self.title)

    @property
    def csv_headings(self) -> list[str]:
        """Those of its columns in CSV."""
        if not self.interval:
            return [self.heading]
        return [replace(self, title=f"{self.title} {end}").heading for end in ("from", "to")]


@dataclass(frozen=True)
class Provenance:
    """What made the numbers of a table and how far to trust them: notes in its files, said elsewhere on a screen or page."""

    warnings: tuple[str, ...] = ()  # of what makes numbers doubtful
    checks: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()  # comments in LaTeX


@dataclass(frozen=True)
class Table:
    """`name` is the name of its file; `notes` say what its numbers mean and under which conditions they hold."""

    name: str
    caption: str
    hardware: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.name}: a row does not have a cell per column"

    @property
    def printed_notes(self) -> tuple[str, ...]:
        """All that is said below the table in a document, but for the commands."""
        return (*self.notes, *(f"WARNING {text}" for text in self.provenance.warnings), *self.provenance.checks)

    def texts(self, escape: Callable[[str], str]) -> list[list[str]]:
        """The rows as people read them: rounded, thousands separated, `escape`d."""
        return [[escape(_readable(cell, column)) for cell, column in zip(row, self.columns)] for row in self.rows]

    def is_numeric(self, index: int) -> bool:
        """Whether column `index` holds numbers; it is then aligned right."""
        return any(isinstance(row[index], int | float | Interval) for row in self.rows)


def _readable(cell: Cell, column: Column) -> str:
    if cell is None:
        return MISSING
    if isinstance(cell, Interval):
        return " to ".join(_readable(float(end), column) for end in cell)
    if isinstance(cell, float):
        return f"{cell:,.{column.digits}f}" if abs(cell) < 1e15 else f"{cell:.3e}"
    return f"{cell:,}" if isinstance(cell, int) else one_line(cell)


def markdown(table: Table) -> str:
    """A heading, a GitHub table with aligned columns, and the notes as a list."""
    rows = [[_markdown(column.heading) for column in table.columns], *table.texts(_markdown)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]
    right = [table.is_numeric(i) for i in range(len(table.columns))]
    lines = [
        "| " + " | ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|"
    told = (*table.printed_notes, *table.provenance.commands)
    notes = "".join(f"- {_markdown(one_line(note))}\n" for note in told)
    head = f"### {_markdown(one_line(table.caption))}\n\n"
    return head + "\n".join([lines[0], rule, *lines[1:]]) + "\n" + (f"\n{notes}" if notes else "")


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word means nothing in Markdown


def csv_text(table: Table) -> str:
    """One line of headings, one per row; numbers plain and in full, the unit in the heading, the hardware last."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_csv(heading) for column in table.columns for heading in column.csv_headings] + ["Hardware"])
    for row in table.rows:
        cells = [cell for column, whole in zip(table.columns, row) for cell in (_ends(whole) if column.interval else (whole,))]
        writer.writerow([_csv(MISSING if cell is None else cell) for cell in cells] + [_csv(table.hardware)])
    return file.getvalue()


def _ends(cell: Cell) -> tuple[float | None, float | None]:
    assert cell is None or isinstance(cell, Interval)
    return cell or (None, None)


def _csv(cell: Any) -> Any:
    """Put an apostrophe before text that begins with = + - or @, which a spreadsheet would run as a formula."""
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and not number else text


def latex(table: Table) -> str:
    """booktabs `table` environments, as many as its columns need to stay within the text of an article.

    Few models with many numbers stand side by side, a column each. Every environment begins with the columns that say what a
    row is, up to the first one of text.
    """
    matrix = [[column.heading for column in table.columns], *table.texts(str)]
    right = [table.is_numeric(i) for i in range(len(table.columns))]
    if is_wide(table):
        matrix = [list(row) for row in zip(*matrix)]
        right = [False] + [True] * (len(matrix[0]) - 1)
    parts = _within_the_text(matrix, 1 + right.index(False) if False in right else 1)
    return "\n".join(_environment(table, matrix, right, part, i, len(parts)) for i, part in enumerate(parts))


def _environment(table: Table, matrix: list[list[str]], right: list[bool], part: list[int], index: int, count: int) -> str:
    """The columns `part`, number `index` of `count` environments; the notes are in the last."""
    rows = [[_latex_cell(row[i]) for i in part] for row in matrix[1:]]
    headings = [_latex_heading(matrix[0][i]) for i in part]
    lines = ["    " + " & ".join(row) + r" \\" for row in [headings, *rows]]
    of_all = f" ({index + 1} of {count})" if count > 1 else ""
    label = table.name.replace("_", "-") + (f"-{index + 1}" if index else "")
    comments = [f"% {_latex(one_line(command, 2000))}" for command in table.provenance.commands]
    told = [rf"\par\smallskip {{\sloppy\footnotesize {_latex(one_line(note))}\par}}" for note in table.printed_notes]
    notes = "".join(f"\n  {note}" for note in told)
    return "\n".join(
        [
            *([r"% needs \usepackage{booktabs}", *comments] if not index else []),
            r"\begin{table}[t]",
            r"  \centering",
            rf"  \caption{{{_latex(one_line(table.caption) + of_all)}}}",
            rf"  \label{{tab:{label}}}",
            r"  \footnotesize\setlength{\tabcolsep}{3pt}",
            rf"  \begin{{tabular}}{{{''.join('r' if right[i] else 'l' for i in part)}}}",
            r"    \toprule",
            lines[0],
            r"    \midrule",
            *lines[1:],
            r"    \bottomrule",
            r"  \end{tabular}" + (notes if index == count - 1 else ""),
            r"\end{table}",
            "",
        ]
    )


TEXT_WIDTH = 340.0  # points of an article's line, of 345
COLUMN_GAP = 6.0  # points, twice \tabcolsep
CELL_CHARS = 36  # of a line in a cell


def _within_the_text(matrix: list[list[str]], names: int) -> list[list[int]]:
    """The columns in groups that fit, the first `names` in each."""
    widths = [
        COLUMN_GAP + max(map(_points, [*textwrap.wrap(column[0], HEADING_CHARS), *map(_widest, column[1:])]))
        for column in map(list, zip(*matrix))
    ]
    first = list(range(names))
    groups, room = [[*first]], TEXT_WIDTH - sum(widths[:names])
    for i, width in enumerate(widths[names:], names):
        if width > room and len(groups[-1]) > names:
            groups.append([*first])
            room = TEXT_WIDTH - sum(widths[:names])
        groups[-1].append(i)
        room -= width
    return groups


def _points(text: str) -> float:
    """An upper bound of the width of `text` in Computer Modern of 8 points."""
    return sum(7.6 if c in "mwMW%@" else 6.6 if c.isupper() else 4.9 for c in text)


def _widest(text: str) -> str:
    return max(textwrap.wrap(text, CELL_CHARS), key=len, default="")


def is_wide(table: Table) -> bool:
    """Whether the table has too many columns for a page, and so few rows that these can be the columns instead."""
    return len(table.columns) > 8 and 0 < len(table.rows) <= 5


HEADING_CHARS = 10


def _latex_heading(heading: str) -> str:
    """A narrow column's heading, one word a line."""
    return _stacked(textwrap.wrap(heading, HEADING_CHARS))


def _latex_cell(text: str) -> str:
    """A cell, broken into lines if it is long."""
    return _stacked(textwrap.wrap(text, CELL_CHARS), "[l]") if len(text) > CELL_CHARS else _latex(text)


def _stacked(lines: list[str], align: str = "") -> str:
    words = [_latex(line) for line in lines] or [""]
    return words[0] if len(words) == 1 else rf"\shortstack{align}{{" + r" \\ ".join(words) + "}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "²": r"$^2$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "µ": r"$\mu$",
    **{character: "\\" + character for character in "{}$&#%_"},
    **{character: f"{{{character}}}" for character in "[]*-`'"},  # after a row's end, or doubled, they mean something else
}


def _latex(text: str) -> str:
    """`text` in characters that every LaTeX engine can set: Latin-1 letters stay, others become a question mark."""
    if re.fullmatch(r"-[\d,.]+", text):
        return f"$-${text[1:]}"
    return "".join(_LATEX.get(c, c if c.isascii() or "À" <= c <= "ÿ" else "?") for c in text)


SUFFIXES = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}
_FORMS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "csv": csv_text, "latex": latex}


def render(table: Table, form: str) -> str:
    """The text of `table` as markdown, csv or latex."""
    return _FORMS[form](table)
