"""The page of `phase1 report`, parsed: whole, safe, the same every time, and with every verdict and number of the records."""

import ast
import base64
import csv
import html
import json
import re
import shutil
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import html5lib
import pytest

from phase1.checks.regression import differences
from phase1.cli import main
from phase1.page import page
from phase1.page.words import JAPANESE
from phase1.records.collect import KINDS
from phase1.records.metrics import FIELDS, METRICS
from phase1.records.schema import FILES, write_report
from phase1.tables import build_tables
from phase1.tables.training import trainings_in
from tests.reports import (
    all_reports,
    assert_one_line,
    failed,
    memory_report,
    perplexity_report,
    perplexity_result,
    throughput_report,
    write_all,
)
from tests.test_security import HOSTILE, hostile

RESULTS = Path(__file__).parents[2] / "results"
V1 = Path(__file__).parents[1] / "fixtures" / "v1"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is fetched, nothing runs
LARGEST = 2e6  # bytes of a page of committed results, which goes into a mail
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr", "col"}


class Page(HTMLParser):
    """Elements, texts by element, and what is wrong with the structure."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.tags, self.ids, self.checks, self.cells = [], [], [], [], {}, []
        assert text.startswith("<!doctype html>")
        self.feed(text)
        self.close()
        self.wrong += [f"open: {name}" for name in self.open]
        self.wrong += [f"id twice: {name}" for name in {n for n in self.ids if self.ids.count(n) > 1}]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        given = dict(attributes)
        self.wrong += [f"{tag} has {name} twice" for name in given if [n for n, _ in attributes].count(name) > 1]
        self.ids += [given["id"]] if "id" in given else []
        if tag in ("td", "th"):
            self.cells.append("")
        if "data-check" in given:
            self.checks[given["data-check"]] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data
        if "tr" in self.open and "section" in self.open and self.checks:
            self.checks[list(self.checks)[-1]] += data + "\n"


def assert_safe(text):
    """Nothing in it runs or is fetched; its structure is whole."""
    html5lib.HTMLParser(strict=True).parse(text)  # raises for what a browser would have to guess
    found = Page(text)
    assert found.wrong == []
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "img", "image", "foreignobject"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name.rpartition(":")[2] in ("href", "src", "srcset", "action", "data"):
                assert value.startswith(("#", "data:text/csv;base64,", "data:application/json;base64,")), (
                    tag,
                    name,
                    value[:80],
                )
            assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", value or "")), (tag, name)
    targets = [a["href"][1:] for _, a in found.tags if a.get("href", "").startswith("#")]
    targets += [a["xlink:href"][1:] for _, a in found.tags if "xlink:href" in a]
    targets += re.findall(r"url\(#([^)]*)\)", text)
    assert set(targets) <= set(found.ids)
    assert [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"] == [POLICY]
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == text.count("<svg") and all("<text" in plot for plot in plots)  # words that can be found and read aloud
    assert "@import" not in text and text.count("<style>") + text.count('<style type="text/css">') == text.count("</style>")
    return found


def whole(reports, **options):
    return page(reports, title="results", **options)


def report(folder, *flags, code=0):
    assert main(["report", "--results-dir", str(folder), *flags]) == code
    return (folder / "report.html").read_text("utf-8") if not code and "--out" not in flags else ""


def test_the_page_of_committed_results_is_one_safe_file_with_every_verdict(tmp_path, capsys):
    folder = tmp_path / "h100"
    shutil.copytree(RESULTS / "archive" / "h100", folder)
    text = report(folder)
    found = assert_safe(text)
    assert text.count("<svg") == 5 and len(text.encode()) < LARGEST
    for name in FILES.values():
        for check in json.loads((folder / name).read_text())["checks"]:
            said = " ".join(found.checks[check["name"]].split())
            assert check["status"].upper() in said and " ".join(check["detail"].split()) in said, check
    assert 'name="viewport"' in text and '<html lang="en">' in text
    assert "cuda_graphs" in text and "wikitext103" in text  # folders below, named
    assert report(folder) == text
    assert f"files {folder}/: report.html" in capsys.readouterr().out


def test_the_page_of_the_results_that_documents_show_is_as_small(tmp_path):
    folder = tmp_path / "h200"
    shutil.copytree(RESULTS / "h200", folder)
    text = report(folder)
    assert_safe(text)
    assert "<svg" in text and len(text.encode()) < LARGEST


def test_its_numbers_are_those_of_the_tables():
    cells = Page(whole(all_reports())).cells
    for table in build_tables(all_reports()):
        for row in table.texts(str):
            assert set(row) <= set(cells), table.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", ["en", "ja"])
def test_any_report_alone_is_a_page_that_says_what_is_missing(kind, language):
    text = whole({kind: all_reports()[kind]}, language=language)
    assert_safe(text)
    for other in set(KINDS) - {kind}:
        assert f"(phase1 {other})" in text and f'id="{other}"' not in text
    assert f'id="{kind}"' in text


@pytest.mark.parametrize(
    "reports",
    [
        {"memory": memory_report(results={"phase1": type(memory_report().results["phase1"])(**failed("phase1"))}, checks=[])},
        {"throughput": throughput_report(checks=[])},
        {"perplexity": perplexity_report(results={"phase1_htt16_ar32": perplexity_report().results["phase1_htt16_ar32"]})},
        {"perplexity": perplexity_report(results={"baseline": type(perplexity_report().results["baseline"])(**failed("baseline", "error"))})},
    ],
)  # fmt: skip
def test_failed_results_and_those_without_a_baseline_are_shown(reports):
    text = whole(reports)
    assert_safe(text)
    assert "out of memory" in text or "37.06" in text


def test_an_untrained_model_shows_no_perplexity():
    results = {
        "baseline": perplexity_result("baseline", 34.9),
        "phase1_htt16_ar32": perplexity_result("phase1", 9876.0, untrained=True),
    }
    text = whole({"perplexity": perplexity_report(results=results)})
    found = assert_safe(text)
    assert "UNTRAINED" in found.cells and not re.search(r"9,?876", text) and "34.90" in found.cells


def test_results_of_earlier_versions_are_shown():
    assert_safe(report_of(V1))


def report_of(folder):
    from phase1.records.collect import read_reports

    return whole(read_reports(folder))


@pytest.mark.parametrize("text", [HOSTILE, "<script>alert(1)</script>", "</style><b>", '"><img src=x onerror=y>', "\u202e" * 9, "x" * 10_000, "日本語 &amp; $x$"])  # fmt: skip
def test_hostile_texts_stay_texts(text, monkeypatch):
    monkeypatch.setattr("tests.test_security.HOSTILE", text)
    reports = {kind: hostile(made).model_copy(update={"warnings": [text]}) for kind, made in all_reports().items()}
    made = page(reports, title=text, files_of={"a.json": text.encode()}, elsewhere=[text])
    assert_safe(made)
    assert "\u202e" not in made and "<img" not in made


def test_a_plot_that_cannot_be_drawn_costs_no_number(monkeypatch):
    monkeypatch.setattr("phase1.page.document.plots_of", lambda made: [lambda *_: 1 / 0])
    text = whole({"memory": memory_report()})
    assert "no plot: ZeroDivisionError" in text and "9.26" in text


def test_in_japanese_every_word_of_the_page_is_japanese():
    text = whole(all_reports() | {"memory": memory_report(warnings=["hot"])}, changes=[], language="ja")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert len(headings) == 9 and not any(re.search("[A-Za-z]", heading) for heading in headings)
    assert set(headings) <= set(JAPANESE.values()) and '<html lang="ja">' in text
    assert not re.search(r"\b(PASS|FAIL|INCONCLUSIVE)</b>", text)


def changed():
    """Changes of every metric, and a reason why one is not compared."""
    return differences({"perplexity": perplexity_report()} | {"memory": memory_report()}, all_reports())


KNOWN = ("T", "tokens", "GB", "AR-SSM", "HTT")  # symbols, units and names, the same in both languages


@pytest.mark.parametrize("apart", [False, True])
def test_in_japanese_headings_of_changes_and_facts_machines_and_warnings_are_japanese(apart):
    """Also where every report has facts of its own."""
    reports = all_reports() | {"memory": memory_report(warnings=["熱い"], **({"environment": {"cpu": "x"}} if apart else {}))}
    text = whole(reports, changes=changed(), language="ja")
    for section in ("changes", "environment"):
        (inside,) = re.findall(rf'<section id="{section}">(.*?)</section>', text, re.DOTALL)
        headings = re.findall(r'<th scope="col".*?>(.*?)</th>', inside)
        assert len(headings) == (6 if section == "changes" else 4 if apart else 2)
        for heading in headings:
            assert set(re.findall("[A-Za-z-]+", heading)) <= set(KNOWN), heading
    (header,) = re.findall("<header>(.*?)</header>", text, re.DOTALL)
    assert "<li>メモリ: 熱い</li>" in text and "(実測)" in header and "measured" not in header
    assert ("スループット、パープレキシティ: NVIDIA Test" in header) == apart


def test_every_number_of_a_cell_is_in_a_csv_that_the_page_links():
    text = whole(all_reports(), changes=changed(), language="ja")
    linked = re.findall(r'href="data:text/csv;base64,([^"]*)"', text)
    known = {cell for link in linked for row in csv.reader(base64.b64decode(link).decode().splitlines()) for cell in row}
    numbers = {float(cell) for cell in known if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", cell)}
    rounded = {f"{factor * n:.{d}f}" for n in numbers for d in range(5) for factor in (1, 1e-9)}
    cells = [html.unescape(cell).removeprefix("> ") for cell in re.findall("<td[^>]*>(.*?)</td>", text)]
    shown = [cell for cell in cells if re.match(r"-?\d", cell)]
    assert len(shown) > 100 and len(linked) == len(set(linked))
    for cell in shown:
        parts = re.fullmatch(r"(-?[\d,.]+)(?: to (-?[\d,.]+))?(?: (?:GB|%|x))?", cell)
        found = parts and all(part.replace(",", "") in rounded for part in parts.groups() if part)
        assert cell in known or found, cell


def test_what_changed_against_an_earlier_run(tmp_path):
    old, new = (write_all(folder) for folder in (tmp_path / "old", tmp_path / "new"))
    write_report(
        perplexity_report(
            results=perplexity_report().results
            | {"baseline": perplexity_report().results["baseline"].model_copy(update={"perplexity": 30.0})}
        ),
        old / FILES["perplexity"],
    )
    text = report(new, "--against", str(old))
    assert 'id="changes"' in text and "16.33" in text  # 100 (34.9 / 30 - 1)
    assert_safe(text)


def training(folder, losses=(5.0, 4.0)):
    folder.mkdir(parents=True)
    rows = [
        dict.fromkeys(FIELDS) | {"session": 1, "step": i + 1, "tokens": 32 * i + 32, "seconds": 1.5, "loss": x, "val_loss": x + 1}
        for i, x in enumerate(losses)
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.txt").write_text("== step 1\n<b>once\x1b[31m upon</b>\n")
    (folder / "run.toml").write_text('prompt = "a"\n')


def test_a_folder_of_a_training_shows_its_curve_samples_and_settings(tmp_path):
    training(tmp_path / "run")
    text = report(tmp_path / "run")
    found = assert_safe(text)
    assert text.count("<svg") == 1 and {"run", "5.0000", "4.0000", "64"} <= set(found.cells)
    assert "&lt;b&gt;once?[31m upon" in text and "prompt = &quot;a&quot;" in text


def test_several_trainings_are_in_one_plot(tmp_path):
    for name in ("a", "b"):
        training(tmp_path / name)
    training(tmp_path / "checkpoints" / "c")
    assert [made.name for made in trainings_in(tmp_path)] == ["a", "b", "c"]
    assert report(tmp_path).count("<svg") == 1


@pytest.mark.parametrize("name, content, code, says", [
    (None, None, 3, "no result file and no metrics.jsonl"),
    (FILES["memory"], "{}", 2, "phase1_memory_validation.json"),
    (METRICS, "hello\n", 2, "expected a file that `phase1 train` wrote"),
    (METRICS, "hello", 2, "expected a file that `phase1 train` wrote"),
    (METRICS, '{"step": 1, "tok', 2, "got no whole step yet; run the train command again"),
    (METRICS, '{"step": 1, "tok\n', 2, "got no whole step yet; run the train command again"),
])  # fmt: skip
def test_bad_folders_are_one_line(tmp_path, capsys, name, content, code, says):
    if name:
        (tmp_path / name).write_text(content)
    report(tmp_path, code=code)
    err = capsys.readouterr().err
    assert_one_line(err)
    assert says in err and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name, content, says", [
    (FILES["throughput"], "{}", "expected a phase1 throughput report"),
    (f"torn/{METRICS}", '{"step": 1, "tok', "got no whole step yet; run the train command again"),
    ("run/checkpoint.json", "garbage", "expected the index of a checkpoint; got no strict JSON"),
    ("run/checkpoint.json", "[]", "expected the index of a checkpoint; got the file of another program"),
])  # fmt: skip
def test_one_damaged_file_is_named_and_all_the_rest_is_on_the_page(tmp_path, capsys, name, content, says):
    write_report(all_reports()["memory"], tmp_path / FILES["memory"])
    training(tmp_path / "run")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    report(tmp_path, code=2)
    text, err = (tmp_path / "report.html").read_text(), capsys.readouterr().err
    assert_one_line(err)
    assert err.startswith(f"phase1 report: damaged: {tmp_path / name}: ") and says in err
    assert 'id="memory"' in text and 'id="training"' in text and 'id="throughput"' not in text
    assert main(["tables", "--results-dir", str(tmp_path)]) == 2
    assert f"phase1 tables: damaged: {tmp_path / name}: " in capsys.readouterr().err
    assert (tmp_path / "tables" / "memory_comparison.md").exists() and (tmp_path / "tables" / "training_course.md").exists()


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_every_color_of_text_is_readable_in_light_and_dark():
    style = files("phase1.page").joinpath("style.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in style.split("@media")[:2])
    for colors in (light, dark):
        for ink in ("ink", "quiet", "link", "pass", "fail", "inconclusive"):
            for paper in ("paper", "shade"):
                low, high = sorted(luminance(colors[name]) for name in (ink, paper))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def code_lines(source):
    """Lines that say something to Python: no docstrings, comments and blank lines."""
    docstrings = (node.body[0] for node in ast.walk(ast.parse(source)) if getattr(node, "body", None) and ast_docstring(node))
    said = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    return [line for i, line in enumerate(source.splitlines(), 1) if i not in said and line.strip() and not line.lstrip().startswith("#")]


def ast_docstring(node):
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)


def test_the_source_of_the_page_stays_small():
    assert code_lines('"""Doc."""\n\ndef f():\n    """Doc\n    more."""\n    # why\n    return 1\n') == ["def f():", "    return 1"]
    source = [path for path in Path(files("phase1.page")).glob("*.py") if path.name != "words.py"]
    assert len(source) == 3 and 100 < sum(len(code_lines(path.read_text())) for path in source) <= 250
