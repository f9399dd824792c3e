"""The results page: a record is shown by a line in a list, with what made it; a wrong line is named."""

import json

import pytest

from phase1.commands.tables import main
from phase1.errors import exit_status
from phase1.machine.cards import card_for
from phase1.presets import PRESETS
from phase1.records.schema import FILES, Fit, write_report
from phase1.runs import TablesRun
from phase1.tables.memory import cards_comparison
from phase1.tables.results_page import GUIDES, READMES, generated
from phase1.tables.rows import benchmark, rows_table
from phase1.tables.summary import WORDS, speed_row
from tests.reports import all_reports

LIST = """
cards = ["card/phase1_memory_validation.json"]

[summary]
memory = "m/phase1_memory_validation.json"
speed = "m/phase1_throughput_benchmark.json"
linear = "m/phase1_throughput_benchmark.json"
perplexity = "m/phase1_perplexity_validation.json"

[screens]
"phase1 doctor" = "doctor.txt"

[[section]]
title = "Memory"
text = "A sentence."
picture = "m/plot.png"
alt = "A plot"

[[section.table]]
record = "m/phase1_memory_validation.json"
tables = ["memory_comparison"]
title = "One step"

[[section.table]]
record = "steps.jsonl"
name = "steps"
caption = "Steps"
command = "python steps.py"
rows = ""
columns = [{ title = "Model", key = "role" }, { title = "Peak", key = "bytes", unit = "GB", scale = 1e-9 }]
"""
MARKS = "# x\n<!-- results: begin -->\n<!-- results: end -->\n<!-- phase1 doctor: begin -->\n<!-- phase1 doctor: end -->\nend\n"


@pytest.fixture
def root(tmp_path):
    reports = all_reports()
    for kind, report in reports.items():
        write_report(report, tmp_path / "results/m" / FILES[kind])
    report = reports["perplexity"]
    rival = {"transformer_fair_copy": next(result for key, result in report.results.items() if key == "baseline")}
    more = report.model_copy(update={"results": report.results | rival})
    write_report(more, tmp_path / "results/m" / FILES["perplexity"])
    (tmp_path / "results/page.toml").write_text(LIST)
    (tmp_path / "results/m/plot.png").write_bytes(b"a picture")
    (tmp_path / "results/doctor.txt").write_text("cuda_works  no\n")
    (tmp_path / "results/steps.jsonl").write_text(
        "".join(json.dumps({"role": role, "bytes": 2 * 10**9, "commit": "abc", "device": "H9"}) + "\n" for role in ("a", "b"))
    )
    write_report(of_card("RTX 4060 8 GB", 7), tmp_path / "results/card" / FILES["memory"])
    (tmp_path / "docs/ja").mkdir(parents=True)
    for name in READMES:
        (tmp_path / name).write_text(MARKS)
    for name in GUIDES:
        (tmp_path / name).write_text("a\n<!-- cards: begin -->\n<!-- cards: end -->\nb\n")
    return tmp_path


def test_the_page_has_the_tables_of_the_list_with_command_commit_and_card(root):
    page = generated(root)[root / "docs/results.md"]
    assert "## Memory\n\nA sentence.\n\n![A plot](../results/m/plot.png)\n" in page
    assert "### One step: peak memory of one training step" in page
    assert "| PASS " in page and "commit not recorded, NVIDIA Test 10GB, 10.0 GB" in page
    assert "Made by `python steps.py`; commit abc, H9, [record](../results/steps.jsonl)." in page
    assert "| a     |      2.00 |" in page


def test_both_readmes_have_the_first_table_in_their_language_and_the_screen(root):
    files = generated(root)
    english, japanese = (files[root / name] for name in READMES)
    assert english.startswith("# x\n<!-- results: begin -->\nMeasured on NVIDIA Test 10GB") and english.endswith("end\n")
    assert "```text\ncuda_works  no\n```" in english and "```text\ncuda_works  no\n```" in japanese
    assert WORDS["ja"]["linear"] in japanese and WORDS["en"]["linear"] in english
    numbers = [line.split("|")[2:5] for line in english.splitlines() if line.startswith("| peak")]
    assert len(numbers) == 1 and numbers == [line.split("|")[2:5] for line in japanese.splitlines() if "ピークメモリ、" in line]
    assert {file for file in files} == {root / "docs/results.md", *(root / name for name in (*READMES, *GUIDES))}


def test_the_command_writes_them_and_does_so_again_to_the_byte(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    assert main(TablesRun(results_page=True)) == 0
    assert "5 documents written" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in root.rglob("*.md")}
    assert main(TablesRun(results_page=True)) == 0
    assert before == {path: path.read_bytes() for path in root.rglob("*.md")}
    assert not (root / "tables").exists()


@pytest.mark.parametrize(
    "change, message",
    [(('["memory_comparison"]', '["memory_comparisons"]'), "got memory_comparisons; correct results/page.toml"),
     (('key = "bytes"', 'key = "byte"'), r"results/steps\.jsonl, row 1: expected the key byte; got none"),
     (("m/phase1_memory_validation.json", "x/a.json"), r"page\.toml: expected the file results/x/a\.json, .* missing"),
     (('"steps.jsonl"', '"none.jsonl"'), r"page\.toml: expected the file results/none\.jsonl"),
     (("m/plot.png", "none.png"), r"page\.toml: expected the file results/none\.png"),
     (("doctor.txt", "none.txt"), r"page\.toml: expected the file results/none\.txt"),
     (("card/phase1", "card/none"), r"page\.toml: expected the file results/card/none"),
     (('speed = "m/', 'speed = "x/'), r"page\.toml: expected the file results/x/phase1_throughput"),
     (('["card/phase1_memory_validation.json"]', "[]"), r"page\.toml, cards: expected records of .* --fit; got none"),
     (('["card/', '["m/'), r"page\.toml, cards: expected a report of .* --fit; got another, m/phase1_memory"),
     (("[summary]", "[sumary]"), r"page\.toml: no key is called sumary; did you mean summary\?"),
     (("linear =", "liner ="), r"page\.toml, summary: no key is called liner; did you mean linear\?"),
     (("[[section.table]]", "[[section.tables]]"), r"section 1: no key is called tables; did you mean table\?"),
     (("caption =", "capton ="), r"section 1, table 2: no key is called capton; did you mean caption\?"),
     (("columns =", "colums ="), r"section 1, table 2: expected targets or .*; did you mean columns\?"),
     (('record = "steps.jsonl"', ""), r"section 1, table 2: expected the key record; got name, caption"),
     (('unit = "GB"', 'unti = "GB"'), r"table 2, columns 2: no key is called unti; did you mean unit\?"),
     (("1e-9", '"1e-9"'), r"columns 2, scale: expected a number; got '1e-9'"),
     (('["memory_comparison"]', '"memory_comparison"'), r"table 1, tables: expected a list; got 'memory_comparison'"),
     (('alt = "A plot"', ""), r"page\.toml, section 1: expected picture and alt"),
     (("[summary]", "[[summary"), r"page\.toml: expected TOML; got .*line 4"),
     (('key = "bytes"', 'key = "role"'), r"steps\.jsonl, row 1, role: expected a number; got 'a'"),
     (('"phase1 doctor"', '"phase1 doktor"'), r"README\.md must have the lines <!-- phase1 doktor: begin -->")],
)  # fmt: skip
def test_a_wrong_line_is_named_and_nothing_is_written(root, monkeypatch, change, message):
    assert change[0] in LIST
    (root / "results/page.toml").write_text(LIST.replace(*change))
    refused(root, monkeypatch, message)


def refused(root, monkeypatch, message, **flags):
    """One line, exit status 2, nothing written."""
    monkeypatch.chdir(root)
    before = {path: path.read_bytes() for path in root.rglob("*.md")}
    with pytest.raises(ValueError, match=message) as failure:
        main(TablesRun(results_page=True, **flags))
    assert exit_status(failure.value) == 2 and "\n" not in str(failure.value)
    assert before == {path: path.read_bytes() for path in root.rglob("*.md")}


STEP = {"role": "phase1", "settings": {}, "seq_length": 512, "tokens_per_s": 5.0}
TARGETS = """
[[targets]]
what = "bytes"
at_most = 3e9
value = { record = "steps.jsonl", rows = "", where = { role = "a" }, key = "bytes" }
"""


@pytest.mark.parametrize(
    "file, content, message",
    [("results/steps.jsonl", "{", r"results/steps\.jsonl: expected the JSON of a benchmark; got line 1: "),
     ("results/steps.jsonl", '{"role": "a", "bytes": 1}\n{"role": "b"}', r"results/steps\.jsonl, row 2: expected the key bytes"),
     ("results/steps.jsonl", "", r"results/steps\.jsonl: expected rows at ''; got \[\]"),
     ("results/steps.jsonl", "5", r"results/steps\.jsonl, row 1: expected the key role; got none"),
     ("results/m/phase1_memory_validation.json", "{", r"results/m/phase1_memory_validation\.json: expected a phase1 memory"),
     ("results/m/phase1_throughput_benchmark.json", "{}", r"phase1_throughput_benchmark\.json: expected a phase1 throughput"),
     ("results/speed.json", "{", r"results/speed\.json: expected the JSON of a benchmark; got Expecting property"),
     ("results/speed.json", json.dumps([STEP | {"tokens_per_s": float("nan")}]), r"results/speed\.json: .* got the number NaN"),
     ("results/speed.json", "3", r"results/speed\.json: expected the key rows; got none"),
     ("results/speed.json", "[3]", r"results/speed\.json, row 1: expected a table; got 3"),
     ("results/speed.json", "[]", r"page\.toml, summary: expected records of all models"),
     ("results/speed.json", json.dumps([STEP, STEP | {"tokens_per_s": "fast"}]), r"speed\.json, row 2, tokens_per_s: expected a n"),
     ("results/speed.json", json.dumps([{**STEP, "role": None}]), r"speed\.json, row 1, role: expected text; got None"),
     ("results/speed.json", '{"rows": [{"role": "phase1"}]}', r"speed\.json, row 1: expected the key settings; got role"),
     ("results/targets.toml", "[[", r"results/targets\.toml: expected TOML; got "),
     ("results/targets.toml", "", r"results/targets\.toml: expected the key targets"),
     ("results/targets.toml", TARGETS.replace("[[targets]]", "[[target]]"), "no key is called target; did you mean targets"),
     ("results/targets.toml", TARGETS.replace('"a"', '"c"'), r"results/targets\.toml: target 1 \(bytes\), value: .*expected a row"),
     ("results/targets.toml", None, r"page\.toml: expected the file results/targets\.toml"),
     ("results/doctor.txt", b"\xff", r"results/doctor\.txt: expected a text file in UTF-8; got "),
     ("README.md", None, r"README\.md: expected a text file in UTF-8; got No such file"),
     ("results/page.toml", None, "must run in a checkout of the project")],
)  # fmt: skip
def test_a_damaged_or_missing_file_is_named_in_one_line_and_nothing_is_written(root, monkeypatch, file, content, message):
    entry = '\n[[section.table]]\ntargets = "targets.toml"\nname = "t"\ncaption = "Targets"\n'
    speed = 'speed = "speed.json"' if file == "results/speed.json" else 'speed = "m/phase1_throughput_benchmark.json"'
    (root / "results/page.toml").write_text(LIST.replace('speed = "m/phase1_throughput_benchmark.json"', speed) + entry)
    (root / "results/targets.toml").write_text(TARGETS)
    (root / "results/speed.json").write_text(json.dumps([STEP, STEP | {"role": "baseline_fast"}]))
    assert "| bytes | ≤ 3,000,000,000 | " in generated(root)[root / "docs/results.md"]
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(root, monkeypatch, message)


@pytest.mark.parametrize(
    ("said", "flags"),
    [("--out-dir x", {"out_dir": "x"}), ("--formats csv", {"formats": ("csv",)}), ("--hardware x", {"hardware": "x"}),
     ("--results-dir x", {"results_dir": "x"}), ("--verbose", {"verbose": True})],
)  # fmt: skip
def test_the_page_takes_no_other_flag(root, monkeypatch, said, flags):
    refused(root, monkeypatch, f"got {said}; leave one", **flags)
    assert not (root / "x").exists()


def of_card(name, batch, seq_length=2048, card="rtx4060"):
    report = all_reports()["memory"]
    common = {"status": "ok", "step": 1, "bound": 4096, "limit_bytes": 7_200_000_000, "basis": "estimated", "probes": []}
    fits = [Fit(searched="batch_size", batch_size=batch, seq_length=2048, **common)]
    fits.append(Fit(searched="seq_length", batch_size=1, seq_length=64 * batch, **common))
    update = {"fit": fits, "basis": "estimated"}
    results = {role: report.results[role].model_copy(update=update) for role in ("baseline", "baseline_optimized", "phase1")}
    return report.model_copy(update={"results": results, "run": {"seq_length": seq_length, "card": card, "card_name": name}})


@pytest.mark.parametrize("card, preset", [("rtx4060", "`rtx4060-8g`"), ("rtx2060", "none; `--card rtx2060 --fit`")])
def test_a_guide_says_the_preset_of_a_card_and_what_trains_on_it(root, card, preset):
    write_report(of_card("RTX Z", 7, card=card), root / "results/card" / FILES["memory"])
    english, japanese = (generated(root)[root / name] for name in GUIDES)
    assert f"| RTX Z | {preset} | 7 | 7 | 7 |" in english and "| RTX Z |" in japanese
    assert "Largest batch of 2,048 tokens" in english and english.startswith("a\n<!-- cards: begin -->\n") and english.endswith("b\n")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "smoke"])
def test_every_preset_of_a_card_has_that_card(preset):
    assert card_for(preset).gigabytes == int(preset.split("-")[1].removesuffix("g"))


def test_cards_stand_in_one_table(root):
    for name, batch in (("RTX 1", 3), ("RTX 2", 4096)):
        write_report(of_card(name, batch), root / "results" / name / "memory.json")
    listed = LIST.replace('["card/phase1_memory_validation.json"]', '["RTX 1/memory.json", "RTX 2/memory.json"]')
    (root / "results/page.toml").write_text(listed + "[[section.table]]\ncards = true\n")
    page = generated(root)[root / "docs/results.md"]
    assert "### Largest sizes that train (estimated)" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| RTX")]
    assert rows == [["RTX 1", "7.2", *["3"] * 3, *["192"] * 3], ["RTX 2", "7.2", *[r"\>= 4,096"] * 3, *["262,144"] * 3]]
    with pytest.raises(ValueError, match="one --seq-length"):
        cards_comparison([of_card("a", 1), of_card("b", 1, seq_length=512)])


def test_rows_of_an_object_have_their_names_and_numbers_that_hold_for_all_are_notes(tmp_path):
    entry = {"record": "a.json", "name": "n", "caption": "c", "rows": "shapes", "facts": ["what.x"]}
    entry["columns"] = [{"title": "Shape", "key": "key"}]
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"shapes": {"4 x 8": {}}, "what": {"x": 1.23456}}))
    table = rows_table(benchmark(file), entry)
    assert table.rows == (("4 x 8",),) and table.notes == ("what.x: 1.23",)
    assert rows_table({"shapes": [{"key": None}], "what": {"x": {"a": 1}}}, entry).rows == ((None,),)
    speed = {"title": "Speed", "key": "ms"}
    some = {"shapes": {"a": {"ms": 2}, "b": {}}, "what": {"x": 1}}
    assert rows_table(some, entry | {"columns": [speed | {"optional": True}]}).rows == ((2,), (None,))
    with pytest.raises(ValueError, match=r"results/a\.json, row 2: expected the key ms; got none"):
        rows_table(some, entry | {"columns": [speed]})
    for value in ("fast", True):
        with pytest.raises(ValueError, match=r"results/a\.json, row 1, ms: expected a number; got "):
            rows_table({"shapes": [{"ms": value}], "what": {"x": 1}}, entry | {"columns": [speed | {"unit": "ms"}]})
    for rows in ([], {}, 5, "text", None):
        with pytest.raises(ValueError, match=r"results/a\.json: expected rows at 'shapes'"):
            rows_table({"shapes": rows, "what": {"x": 1}}, entry)


def test_the_second_speed_is_that_of_the_fastest_transformer_at_each_length_and_the_best_is_bold():
    def result(*speeds):
        times = zip((512, 1024, 2048), speeds)
        return {"measurements": [{"seq_length": T, "status": "ok", "tokens_per_second": 1e3 * s} for T, s in times]}

    report = {"kind": "throughput", "results": {"baseline": result(4, 5, 6), "baseline_optimized": result(3, 9, 2)}}
    report["results"] |= {"baseline_fast": result(8, 7, 7), "phase1": result(2, 9, 1000), "baseline_again": result(99, 99, 99)}
    report["results"]["baseline_fast"]["measurements"].append({"seq_length": 4096, "status": "oom"})
    assert speed_row(report, WORDS["en"])[1:] == ["4 / 5 / 6", "**8** / **9** / 7", "2 / **9** / **1,000**"]
    assert "512 / 1,024 / 2,048 tokens" in speed_row(report, WORDS["en"])[0]
