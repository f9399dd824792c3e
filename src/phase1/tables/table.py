"""A table, and its forms in files. Names in cells come from files, so every form neutralises what it would interpret."""

import csv
import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from phase1.text import one_line

Cell = str | float | int | None  # None: not measured, not applicable
MISSING = "n/a"
COMMAND = "Command"  # how the note of what made the numbers begins: in LaTeX a comment, nothing to typeset


@dataclass(frozen=True)
class Column:
    """A heading with its unit, and how its numbers are rounded where people read them (CSV has them in full)."""

    title: str
    unit: str = ""
    digits: int = 2

    @property
    def heading(self) -> str:
        return one_line(f"{self.title} ({self.unit})" if self.unit else self.title)


@dataclass(frozen=True)
class Table:
    """`name` is the file's, `notes` say under which conditions the numbers hold."""

    name: str
    caption: str
    hardware: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.name}: a row does not have a cell per column"

    def texts(self, escape: Callable[[str], str]) -> list[list[str]]:
        """The rows as people read them: rounded, thousands separated, `escape`d."""
        return [[escape(_readable(cell, column)) for cell, column in zip(row, self.columns)] for row in self.rows]

    def is_numeric(self, index: int) -> bool:
        """Whether column `index` holds a number; it is then aligned right."""
        return any(isinstance(row[index], int | float) for row in self.rows)


def _readable(cell: Cell, column: Column) -> str:
    if cell is None:
        return MISSING
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
    notes = "".join(f"- {_markdown(one_line(note))}\n" for note in table.notes)
    head = f"### {_markdown(one_line(table.caption))}\n\n"
    return head + "\n".join([lines[0], rule, *lines[1:]]) + "\n" + (f"\n{notes}" if notes else "")


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word is none of Markdown's business


def csv_text(table: Table) -> str:
    """One line of headings, one per row; numbers plain and in full, the unit in the heading, the hardware last."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_csv(column.heading) for column in table.columns] + ["Hardware"])
    for row in table.rows:
        writer.writerow([_csv(MISSING if cell is None else cell) for cell in row] + [_csv(table.hardware)])
    return file.getvalue()


def _csv(cell: str | float | int) -> str | float | int:
    """A spreadsheet runs text that starts with one of = + - @ as a formula; an apostrophe makes it text again."""
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and not number else text


def latex(table: Table) -> str:
    """A booktabs `table` environment; few models with many numbers stand side by side, a column each."""
    headings = [_latex_heading(column.heading) for column in table.columns]
    rows = table.texts(_latex)
    alignment = "".join("r" if table.is_numeric(i) else "l" for i in range(len(headings)))
    if is_wide(table):
        headings, *rows = [[_latex(column.heading), *cells] for column, cells in zip(table.columns, zip(*rows))]
        alignment = "l" + "r" * (len(headings) - 1)
    lines = ["    " + " & ".join(row) + r" \\" for row in [headings, *rows]]
    told = [note for note in table.notes if not note.startswith(COMMAND)]
    notes = "".join(f"\n  \\par\\smallskip {{\\footnotesize {_latex(one_line(note))}}}" for note in told)
    comments = [f"% {_latex(one_line(note, 2000))}" for note in table.notes if note.startswith(COMMAND)]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs,graphicx}",
            *comments,
            r"\begin{table}[t]",
            r"  \centering",
            rf"  \caption{{{_latex(one_line(table.caption))}}}",
            rf"  \label{{tab:{table.name.replace('_', '-')}}}",
            r"  \footnotesize\setlength{\tabcolsep}{3pt}",
            r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{" + rf"\begin{{tabular}}{{{alignment}}}",
            r"    \toprule",
            lines[0],
            r"    \midrule",
            *lines[1:],
            r"    \bottomrule",
            r"  \end{tabular}}" + notes,
            r"\end{table}",
            "",
        ]
    )


def is_wide(table: Table) -> bool:
    """Too many columns for a page, and few enough rows to be the columns instead."""
    return len(table.columns) > 8 and 0 < len(table.rows) <= 5


def _latex_heading(heading: str) -> str:
    """A narrow column's heading, one word a line."""
    words = [_latex(word) for word in textwrap.wrap(heading, 10)]
    return words[0] if len(words) == 1 else r"\shortstack{" + r" \\ ".join(words) + "}"


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
    """`text` in characters that every engine sets: Latin-1 letters stay, what is unknown becomes a question mark."""
    if re.fullmatch(r"-[\d,.]+", text):
        return f"$-${text[1:]}"
    return "".join(_LATEX.get(c, c if c.isascii() or "À" <= c <= "ÿ" else "?") for c in text)


SUFFIXES = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}
_FORMS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "csv": csv_text, "latex": latex}


def render(table: Table, form: str) -> str:
    """The text of `table` as markdown, csv or latex."""
    return _FORMS[form](table)
