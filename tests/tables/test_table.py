import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.records.collect import read_reports
from phase1.tables import SUFFIXES, Column, Table, build_tables, render
from phase1.tables.console import console
from phase1.tables.table import Interval, Provenance
from tests.reports import all_reports

RESULTS = Path(__file__).parents[2] / "results"
TABLES = build_tables(all_reports())
HOSTILE = [
    "a|b", "=1+1", "+cmd", "-x", "@sum", "  =1", "\t=1", "<script>alert(1)</script>", "[x](javascript:y)", "`x`", "**x**",
    "__x__", "a_b", r"\input{/etc/passwd}", "$x^2$", "50%", "a & b # c", "~{}", "\x1b[31mred", "two\nlines", "日本語", "é",
    '"quoted"', "[first]", "*", "--", r"\\", "-5", "-0.5", "1e-3",
]  # fmt: skip


def table(*rows, columns=None, notes=(), caption="Caption"):
    return Table("a_table", caption, "Card", columns or (Column("Name"), Column("Value", "ms")), rows, notes)


def csv_rows(text):
    return list(csv.reader(io.StringIO(text)))


def markdown_cells(line):
    """The cells of a line as a Markdown parser splits them: at bars that no backslash escapes."""
    return [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line.strip())[1:-1]]


def tex_braces(text):
    """Depth of every unescaped brace; ends at 0 and never goes below."""
    depth = 0
    for brace in re.findall(r"\\[\\{}]|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        assert depth >= 0
    return depth


def environments(text):
    """The `table` environments of a LaTeX file, one after the other."""
    head, *parts = re.split(r"(?m)^(?=\\begin\{table\})", text)
    first, *comments = head.splitlines()
    assert first == r"% needs \usepackage{booktabs}" and parts and all(line.startswith("% ") for line in comments)
    return [part.rstrip("\n") + "\n" for part in parts]


def assert_compilable(text):
    """`table` environments that LaTeX with booktabs sets: structure, counts, commands and characters; the rows of the first."""
    return [_assert_compilable(part) for part in environments(text)][0]


def _assert_compilable(body):
    assert body.startswith("\\begin{table}[t]\n") and body.endswith("\\end{table}\n")
    assert re.findall(r"\\(begin|end)\{(\w+)\}", body) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    assert tex_braces(body) == 0
    known = r"begin|end|centering|caption|label|footnotesize|setlength|tabcolsep|toprule|midrule|bottomrule|par|smallskip"
    known += r"|sloppy|shortstack|textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|times|pm|le|ge|mu"
    assert not re.findall(rf"\\(?!(?:{known})(?![a-zA-Z]))[a-zA-Z]+", body)
    plain = re.sub(r"\\[\\{}$&#%_]", "", body)  # what is left of these characters is syntax
    assert "#" not in plain and "%" not in plain and "~" not in plain
    assert re.sub(r"\$\^2\$|\$\\(times|pm|le|ge|mu)\$|\$-\$", "", plain).count("$") == 0
    assert all(c.isascii() or "À" <= c <= "ÿ" for c in body)
    (alignment,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", body)
    inside = body.split("\\toprule\n")[1].split("    \\bottomrule")[0]
    rows = [line for line in inside.split("\n") if line and line.strip() != r"\midrule"]
    for row in rows:
        assert row.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", row)) == len(alignment) - 1
        assert not re.match(r"\s*[\[*]", row)  # after a row's end these would be its optional argument
    return rows


@pytest.mark.parametrize("built", TABLES, ids=lambda t: t.name)
def test_the_latex_of_every_comparison_is_one_compilable_table(built):
    rows = assert_compilable(render(built, "latex"))
    assert len(rows) in (len(built.rows) + 1, len(built.columns))


@pytest.mark.parametrize("built", TABLES, ids=lambda t: t.name)
def test_the_markdown_of_every_comparison_has_a_cell_per_column_in_every_line(built):
    lines = [line for line in render(built, "markdown").split("\n") if line.startswith("|")]
    assert len(lines) == len(built.rows) + 2
    assert {len(markdown_cells(line)) for line in lines} == {len(built.columns)}
    assert re.fullmatch(r"(\|-+[-:])+\|", lines[1])


@pytest.mark.parametrize("built", TABLES, ids=lambda t: t.name)
def test_the_csv_of_every_comparison_has_its_numbers_in_full(built):
    head, *rows = csv_rows(render(built, "csv"))
    assert head == [heading for column in built.columns for heading in column.csv_headings] + ["Hardware"]
    assert len(rows) == len(built.rows)
    for row, cells in zip(rows, built.rows):
        whole = [ends for column, cell in zip(built.columns, cells) for ends in ((cell or (None, None)) if column.interval else (cell,))]
        assert len(row) == len(whole) + 1
        for text, cell in zip(row, whole):
            if isinstance(cell, int | float):
                assert float(text) == cell
            elif cell is None:
                assert text == "n/a"


def test_an_interval_is_one_cell_for_people_and_two_columns_in_csv():
    columns = (Column("Model"), Column("95 %", "x", 1, interval=True))
    built = Table("t", "c", "", columns, (("a", Interval(0.94, 1234.5)), ("b", None)))
    assert csv_rows(render(built, "csv"))[:2] == [["Model", "95 % from (x)", "95 % to (x)", "Hardware"], ["a", "0.94", "1234.5", ""]]
    assert csv_rows(render(built, "csv"))[2] == ["b", "n/a", "n/a", ""]
    for form in ("markdown", "latex"):
        assert "0.9 to 1,234.5" in render(built, form)
    assert "0.9 to 1,234.5" in console(built)


def test_provenance_is_in_files_and_not_on_a_terminal():
    provenance = Provenance(("hot",), ("PASS it: why",), ("Command: phase1",))
    built = Table("t", "c", "", (Column("Model"), Column("Files", console=False)), (("a", "b"),), ("defined so",), provenance)
    assert render(built, "markdown").endswith("- defined so\n- WARNING hot\n- PASS it: why\n- Command: phase1\n")
    latex = render(built, "latex")
    assert "% Command: phase1" in latex and latex.count("Command") == 1 and "WARNING hot" in latex and "PASS it" in latex
    assert not any(word in console(built) for word in ("Files", "hot", "PASS", "Command"))


FOLDERS = [RESULTS / "h200", RESULTS / "archive/h100", RESULTS / "h200/perplexity_coordinates/pareto"]
MEASURED = [table for folder in FOLDERS for table in build_tables(read_reports(folder))]
TEXT_WIDTH = 345.0  # points, of \\documentclass{article}


def points(text):
    """The width of a cell's text in Computer Modern of 8 points: the font of 10 points that comes with matplotlib, 7 % wider."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "cmr10.ttf")))
    font.set_size(8, 72)
    lines = re.sub(r"\\shortstack(\[l\])?\{(.*)\}$", r"\2", text.strip()).split(r" \\ ")
    widths = []
    for line in lines:
        font.set_text(re.sub(r"\\([a-z]+\{\}|(?=[$&#%_{}]))|\$|\{|\}", "", line))
        widths.append(1.07 * font.get_width_height()[0] / 64)
    return max(widths)


@pytest.mark.parametrize("built", [*TABLES, *MEASURED], ids=lambda t: f"{t.name} {len(t.rows)} x {len(t.columns)}")
def test_no_latex_table_is_wider_than_the_text_of_an_article(built):
    parts = environments(render(built, "latex"))
    for part in parts:
        rows = [re.split(r"(?<!\\)&", row.removesuffix(r" \\")) for row in _assert_compilable(part)]
        assert sum(max(map(points, column)) + 6 for column in zip(*rows)) <= TEXT_WIDTH, part
    shown = {heading for part in parts for heading in _assert_compilable(part)[0].removesuffix(r" \\").split(" & ")}
    assert len(shown) == len({column.heading for column in built.columns}) or len(built.rows) <= 5
    assert [f"({i + 1} of {len(parts)})" in part for i, part in enumerate(parts)] == [len(parts) > 1] * len(parts)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("built", [*TABLES, *MEASURED], ids=lambda t: f"{t.name} {len(t.rows)} x {len(t.columns)}")
def test_latex_sets_every_table_within_the_text(tmp_path, built):
    (tmp_path / "table.tex").write_text(render(built, "latex"), encoding="utf-8")
    (tmp_path / "a.tex").write_text(
        r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}\usepackage{booktabs}"
        r"\begin{document}\input{table}\end{document}"
    )
    ran = subprocess.run(["pdflatex", "-interaction=nonstopmode", "a.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and not re.findall(r"Overfull .hbox \(([1-9]\d+)", ran.stdout)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text_in_every_form(text):
    built = table((text, 1.0), columns=(Column("Name"), Column(text)), notes=(text,), caption=text)
    assert_compilable(render(built, "latex"))
    lines = render(built, "markdown").split("\n")
    assert {len(markdown_cells(line)) for line in lines if line.startswith("|")} == {2}
    assert not re.search(r"(?<!\\)[<>`*\[\]]", render(built, "markdown"))
    for form in SUFFIXES:
        assert "\x1b" not in render(built, form)
    cells = [cell for row in csv_rows(render(built, "csv")) for cell in row]
    assert len(cells) == 6
    assert not any(cell.lstrip()[:1] in ("=", "+", "-", "@") for cell in cells if not re.fullmatch(r"-?[\d.]+(e-\d+)?", cell))
    assert "\x1b" not in console(built)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=2, max_size=2), st.text(max_size=20))
def test_any_text_leaves_the_structure_of_every_form_alone(names, note):
    built = table((names[0], 1.5), (names[1], None), notes=(note,))
    assert len(assert_compilable(render(built, "latex"))) == 3
    assert [len(row) for row in csv_rows(render(built, "csv"))] == [3, 3, 3]
    bars = [line for line in render(built, "markdown").split("\n") if line.startswith("|")]
    assert [len(markdown_cells(line)) for line in bars] == [2, 2, 2, 2]


def test_numbers_are_rounded_where_people_read_them_and_negative_ones_are_set_as_such():
    built = table(("a", -1234.5678), ("b", 7), ("c", 1e300))
    assert "-1,234.57" in render(built, "markdown")
    assert "$-$1,234.57" in render(built, "latex")
    assert "-1234.5678\n" not in render(built, "csv") and ",-1234.5678," in render(built, "csv")
    assert "1.000e+300" in render(built, "markdown")


def test_underscores_inside_a_word_need_no_escape_in_markdown():
    assert "phase1_htt16_ar32" in render(table(("phase1_htt16_ar32", 1)), "markdown")


def test_numeric_columns_are_aligned_right():
    text = render(table(("a", 1.0), ("b", None)), "markdown")
    assert text.split("\n")[3].endswith(":|")
    assert "\\begin{tabular}{lr}" in render(table(("a", 1.0)), "latex")


def test_a_wide_table_of_few_models_stands_on_end_in_latex_and_on_the_console():
    columns = tuple(Column(f"Column {i}") for i in range(9))
    built = table(("model", *range(8)), columns=columns)
    assert len(assert_compilable(render(built, "latex"))) == 9
    assert len(console(built).split("\n")) > 9


def test_a_table_without_rows_renders():
    for form in SUFFIXES:
        assert "Value" in render(table(), form)
    assert "Value" in console(table())


def test_a_row_needs_a_cell_per_column():
    with pytest.raises(AssertionError, match="a_table"):
        table(("only one",))
