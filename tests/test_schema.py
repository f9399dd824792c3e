"""The published JSON Schemas, and the committed results against the models they are made from."""

import json
from pathlib import Path

import pytest

from phase1 import schema
from phase1.record import FILES, RESULTS, read_report

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", RESULTS)
def test_the_published_schema_is_the_one_of_the_models(kind):
    published = json.loads((ROOT / schema.FOLDER / f"{kind}.schema.json").read_text())
    assert published == schema.schema(kind), "out of date: run python -m phase1.schema in the root of the repository"


def test_no_other_schema_is_published():
    assert sorted(path.name for path in (ROOT / schema.FOLDER).iterdir()) == sorted(f"{kind}.schema.json" for kind in RESULTS)


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
    assert read_report(ROOT / "results" / "h100" / FILES[kind], kind).results
