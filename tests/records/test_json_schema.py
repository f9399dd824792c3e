"""The published JSON Schemas, the committed results against them, and files of older versions."""

import copy
import json
import random
from pathlib import Path

import pytest

from phase1.cli import main
from phase1.records import json_schema as schema
from phase1.records.migrate import SCHEMA_VERSION, STEPS, migrated
from phase1.records.schema import FILES, RESULTS, read_report, write_report
from tests.damage import at, places
from tests.json_schema import violations
from tests.reports import all_reports, contents, make_tables

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = range(1, SCHEMA_VERSION)


@pytest.mark.parametrize("kind", RESULTS)
def test_the_published_schema_is_the_one_of_the_models(kind):
    published = json.loads((ROOT / schema.FOLDER / f"{kind}.schema.json").read_text())
    assert published == schema.schema(kind), (
        "out of date: run python -m phase1.records.json_schema in the root of the repository"
    )


def test_no_other_schema_is_published():
    assert sorted(path.name for path in (ROOT / schema.FOLDER).glob("*.json")) == sorted(
        f"{kind}.schema.json" for kind in RESULTS
    )


def test_the_command_writes_every_schema(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    schema.main()
    for kind in RESULTS:
        assert json.loads((tmp_path / "schemas" / f"{kind}.schema.json").read_text()) == schema.schema(kind)
    assert capsys.readouterr().out.count("written: ") == 3


@pytest.mark.parametrize("kind", RESULTS)
def test_a_schema_names_its_kind_and_every_field_of_its_results(kind):
    made = schema.schema(kind)
    assert made["properties"]["kind"]["const"] == kind and made["additionalProperties"] is False
    assert set(made["$defs"][RESULTS[kind].__name__]["properties"]) == set(RESULTS[kind].model_fields)


@pytest.mark.parametrize("kind", RESULTS)
def test_the_committed_results_are_valid(kind):
    """Those of superseded code too: a later version reads what an earlier one wrote."""
    records = list((ROOT / "results").rglob(FILES[kind]))
    assert any("archive" in path.parts for path in records)
    assert all(read_report(path, kind).results for path in records)


def broken(kind, content, folder=""):
    return list(violations(content, json.loads((ROOT / schema.FOLDER / folder / f"{kind}.schema.json").read_text())))


@pytest.mark.parametrize("kind", RESULTS)
def test_a_written_report_conforms_to_the_published_schema(tmp_path, kind):
    write_report(all_reports()[kind], tmp_path / "a.json")
    assert broken(kind, json.loads((tmp_path / "a.json").read_text())) == []


@pytest.mark.parametrize("kind", RESULTS)
def test_what_breaks_the_published_schema_is_refused_by_the_reader(tmp_path, kind):
    good, path, count = json.loads(all_reports()[kind].model_dump_json()), tmp_path / "a.json", 0
    rng, everywhere = random.Random(kind), list(places(good))
    for _ in range(150):
        content, place = copy.deepcopy(good), rng.choice(everywhere)
        at(content, place[:-1])[place[-1]] = rng.choice([None, [], {}, "x", 1.5, True])
        if broken(kind, content):
            count += 1
            path.write_text(json.dumps(content))
            with pytest.raises(ValueError):
                read_report(path, kind)
    assert count > 50


def test_every_version_before_this_one_has_its_step_its_schemas_and_its_fixtures():
    assert list(STEPS) == list(VERSIONS)
    for version in VERSIONS:
        assert {path.name for path in (FIXTURES / f"v{version}").iterdir()} == set(FILES.values())
        assert {path.name for path in (ROOT / schema.FOLDER / f"v{version}").iterdir()} == {f"{k}.schema.json" for k in RESULTS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", RESULTS)
def test_a_fixture_of_an_older_version_conforms_to_its_schema_and_migrated_to_this_one(kind, version):
    content = json.loads((FIXTURES / f"v{version}" / FILES[kind]).read_text())
    assert content["schema_version"] == version and broken(kind, content, f"v{version}") == []
    before = copy.deepcopy(content)
    now = migrated(content, version)
    assert content == before, "a step changes no argument"
    assert now["schema_version"] == SCHEMA_VERSION and broken(kind, now) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_an_older_version_make_tables_and_are_compared(tmp_path, capsys, version):
    folder = FIXTURES / f"v{version}"
    for kind in RESULTS:
        report = read_report(folder / FILES[kind], kind)
        assert report.schema_version == SCHEMA_VERSION and report.results.keys() >= {"baseline"}
        write_report(report, tmp_path / "new" / FILES[kind])
    for results in (folder, tmp_path / "new"):
        assert main(["tables", "--results-dir", str(results), "--out-dir", str(tmp_path / "tables" / results.name)]) == 0
    assert contents(tmp_path / "tables" / folder.name) == contents(tmp_path / "tables" / "new")
    rule = "peak:+0%,tokens_per_second:-1%,perplexity:+0%"
    assert main(["compare", str(folder), str(tmp_path / "new"), "--fail-on", rule]) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_is_a_pure_function_to_the_next_version(version):
    content = {"schema_version": version, "kind": "memory", "results": {}}
    assert STEPS[version](content) == content | {"schema_version": version + 1}


def test_a_report_of_this_version_is_not_migrated():
    content = {"schema_version": SCHEMA_VERSION}
    assert migrated(content, SCHEMA_VERSION) is content


@pytest.mark.parametrize("kind", RESULTS)
def test_a_newer_version_is_one_line_and_exit_2(tmp_path, capsys, kind):
    content = json.loads(all_reports()[kind].model_dump_json()) | {"schema_version": SCHEMA_VERSION + 1, "news": 1}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / FILES[kind]).write_text(json.dumps(content))
    assert make_tables(tmp_path / "in") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert f"expected schema_version up to {SCHEMA_VERSION}; got {SCHEMA_VERSION + 1}; update phase1" in error


def test_version_3_says_basis_where_version_2_said_measured():
    content = json.loads((FIXTURES / "v2" / FILES["memory"]).read_text())
    report = read_report(FIXTURES / "v2" / FILES["memory"], "memory")
    assert {key: result.basis for key, result in report.results.items()} == {
        key: result["measured"] for key, result in content["results"].items()
    }
    assert [fit.basis for fit in report.results["phase1"].fit] == ["emulated", "emulated"]
    assert "measured" not in report.model_dump()["results"]["phase1"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(results=[]),
        lambda content: content["results"].update(phase1=None),
        lambda content: content["results"]["phase1"].update(fit=7),
        lambda content: content["results"]["phase1"].update(basis="measured"),
        lambda content: content["results"]["phase1"]["fit"].append("x"),
    ],
)
def test_a_damaged_file_of_version_2_is_refused_in_one_line(tmp_path, damage):
    content = json.loads((FIXTURES / "v2" / FILES["memory"]).read_text())
    damage(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a phase1 memory report; got") as error:
        read_report(tmp_path / "a.json", "memory")
    assert "\n" not in str(error.value)
