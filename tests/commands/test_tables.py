import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from phase1 import tables
from phase1.commands.tables import main
from phase1.errors import Unavailable
from phase1.records.metrics import FIELDS, METRICS
from phase1.records.schema import FILES, write_report
from phase1.runs import TablesRun
from phase1.tables import build_tables
from tests.reports import all_reports, assert_one_line, memory_result

NAMES = (
    "memory_comparison",
    "memory_breakdown",
    "throughput_comparison",
    "scaling_comparison",
    "perplexity_comparison",
    "configuration_comparison",
)


@pytest.fixture
def run(tmp_path):
    for kind, report in all_reports().items():
        write_report(report, tmp_path / "in" / FILES[kind])
    return TablesRun(results_dir=str(tmp_path / "in"), out_dir=str(tmp_path / "out"), verbose=True)


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def test_every_table_is_written_in_every_format_and_printed(run, capsys):
    assert main(run) == 0
    assert sorted(os.listdir(run.out_dir)) == sorted(f"{name}{suffix}" for name in NAMES for suffix in (".md", ".csv", ".tex"))
    printed = capsys.readouterr().out
    assert printed.count("### ") == len(NAMES)
    assert all(f"{run.out_dir}/{name} " in printed for name in NAMES)


def test_only_the_asked_formats_are_written(run):
    main(TablesRun(results_dir=run.results_dir, out_dir=run.out_dir, formats=("csv", "csv")))
    assert {os.path.splitext(name)[1] for name in os.listdir(run.out_dir)} == {".csv"}


def test_the_csv_holds_the_numbers_of_the_result_file(run):
    main(run)
    with open(f"{run.results_dir}/{FILES['memory']}") as file:
        phase1 = json.load(file)["results"]["phase1"]
    with open(f"{run.out_dir}/memory_comparison.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["Model"] == "phase1")
    assert float(row["Peak allocated (GB)"]) == phase1["peak_allocated_bytes"] / 1e9
    assert row["Config id"] == phase1["config_id"]


def test_a_missing_file_is_named_and_its_tables_are_skipped(run, capsys):
    os.remove(f"{run.results_dir}/{FILES['perplexity']}")
    assert main(run) == 0
    assert f"missing, skipped: {run.results_dir}/{FILES['perplexity']}" in capsys.readouterr().err
    assert not os.path.exists(f"{run.out_dir}/perplexity_comparison.md")
    assert os.path.exists(f"{run.out_dir}/configuration_comparison.md")


def test_no_result_file_at_all_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="no result file"):
        main(TablesRun(results_dir=str(tmp_path), out_dir=str(tmp_path / "out")))
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 1, "kind": "memory"}', '{"schema_version": 9, "kind": "throughput"}']
)
def test_a_corrupt_or_foreign_file_is_named_and_the_tables_of_the_others_are_written(run, content, capsys):
    with open(f"{run.results_dir}/{FILES['throughput']}", "w") as file:
        file.write(content)
    assert main(run) == 2
    assert_one_line(err := capsys.readouterr().err)
    assert err.startswith(f"phase1 tables: damaged: {run.results_dir}/{FILES['throughput']}: expected ")
    written = contents(run.out_dir)
    assert {"memory_comparison.md", "perplexity_comparison.md"} <= written.keys() and "throughput_comparison.md" not in written


def test_a_folder_of_one_damaged_file_is_left_as_it_is(run, capsys):
    main(run)
    before = contents(run.out_dir)
    for kind, name in FILES.items():
        if kind != "memory":
            os.remove(f"{run.results_dir}/{name}")
    with open(f"{run.results_dir}/{FILES['memory']}", "w") as file:
        file.write("{}")
    capsys.readouterr()
    assert main(run) == 2 and "damaged: " in capsys.readouterr().err
    assert contents(run.out_dir) == before


def test_a_report_of_models_of_two_sizes_is_damaged(run, capsys):
    report = all_reports()["memory"]
    report.results["phase1"] = memory_result("phase1", 1, config=report.results["phase1"].config | {"d_model": 99})
    write_report(report, f"{run.results_dir}/{FILES['memory']}")
    assert main(run) == 2 and "different sizes" in capsys.readouterr().err
    assert "perplexity_comparison.md" in contents(run.out_dir) and "memory_comparison.md" not in contents(run.out_dir)


def test_mixed_configurations_are_refused_and_the_tables_stay(run):
    main(run)
    before = contents(run.out_dir)
    report = all_reports()["memory"]
    report.results["phase1"] = memory_result("phase1", 1, config=report.results["phase1"].config | {"mixer": "attention"})
    write_report(report, f"{run.results_dir}/{FILES['memory']}")
    with pytest.raises(ValueError, match="id-phase1"):
        main(run)
    assert contents(run.out_dir) == before


def test_the_hardware_flag_names_every_table_and_captions_keep_what_was_recorded(run):
    main(TablesRun(results_dir=run.results_dir, out_dir=run.out_dir, hardware="A card"))
    for name, data in contents(run.out_dir).items():
        assert b"A card" in data and (b"recorded on NVIDIA" in data or name.endswith(".csv")), name


def test_tables_of_the_same_results_are_the_same_bytes(run):
    main(run)
    before = contents(run.out_dir)
    main(run)
    assert contents(run.out_dir) == before


def test_a_table_of_earlier_results_beside_the_new_ones_is_named(run, capsys):
    out = Path(run.out_dir)
    out.mkdir()
    for name in ("memory_ablation.md", "fit_comparison.tex", "notes.md", "memory_comparison.md"):
        (out / name).write_text("older")
    assert main(run) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "of an earlier run" in line]
    assert [("memory_ablation.md" in line, "fit_comparison.tex" in line) for line in lines] == [(True, False), (False, True)]
    capsys.readouterr()
    assert main(replace(run, formats=("csv",))) == 0
    assert "memory_comparison.md" in capsys.readouterr().err


def test_every_table_that_there_may_be_is_known_by_its_name():
    sources = "".join(path.read_text() for path in Path(tables.__file__).parent.glob("*.py"))
    assert sorted(re.findall(r'\bTable\(\s*"(\w+)"', sources)) == sorted(tables.NAMES)
    assert {table.name for table in build_tables(all_reports())} <= set(tables.NAMES)


def test_the_courses_of_trainings_are_tables_too(tmp_path):
    rows = [dict.fromkeys(FIELDS) | {"session": 1, "step": i, "tokens": 32 * i, "loss": 5.0 - i / 3} for i in (1, 2)]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(TablesRun(results_dir=str(tmp_path), formats=("csv",))) == 0
    with open(tmp_path / "tables" / "training_course.csv") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    with open(tmp_path / "tables" / "training_comparison.csv") as file:
        assert [row["Steps"] for row in csv.DictReader(file)] == ["2"]
