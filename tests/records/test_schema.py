import copy
import json
import math
import random

import pytest
from pydantic import ValidationError

from phase1.records.schema import (
    FILES,
    Check,
    MemoryResult,
    MemoryTimeline,
    Report,
    Scaling,
    exit_code,
    read_report,
    write_report,
)
from tests.reports import (
    all_reports,
    common,
    failed,
    memory_report,
    memory_result,
    perplexity_report,
    perplexity_result,
    throughput_report,
)


def refusal(path, kind="memory"):
    """The message of the refusal of `path`; it is one line and names the file."""
    with pytest.raises(ValueError) as error:
        read_report(path, kind)
    message = str(error.value)
    assert message.isprintable() and str(path) in message
    return message


@pytest.mark.parametrize("kind", FILES)
def test_a_report_reads_back_as_it_was_written(tmp_path, kind):
    report = all_reports()[kind]
    write_report(report, tmp_path / FILES[kind])
    assert read_report(tmp_path / FILES[kind], kind) == report


def test_the_file_has_the_keys_of_the_schema(tmp_path):
    write_report(memory_report(), tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["schema_version"] == 3
    assert {"kind", "environment", "command", "results", "checks"} <= set(content)
    assert set(content["checks"][0]) == {"name", "value", "limit", "status", "detail"}
    phase1 = content["results"]["phase1"]
    assert {"model_name", "config", "config_id", "status", "basis", "parameters", "peak_allocated_bytes"} <= set(phase1)
    assert set(phase1["parameters"]) == {"total", "embedding", "mixer", "mlp", "copy_head"}


def test_tuples_in_settings_become_lists_so_that_a_report_equals_its_file():
    assert throughput_report().run["seq_lengths"] == [512, 1024, 2048, 4096]


def test_an_integer_may_stand_for_a_float_and_nothing_else_for_anything():
    assert Check(name="a", value=3, limit=None, status="pass").value == 3.0
    for wrong in ("3", True, math.nan, math.inf, -math.inf):
        with pytest.raises(ValidationError):
            Check(name="a", value=wrong, limit=None, status="pass")
    with pytest.raises(ValidationError):
        MemoryResult(**common("phase1"), peak_allocated_bytes=3.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}], ids=lambda value: str(value)[:7])
def test_settings_hold_only_what_json_can_hold(value):
    with pytest.raises(ValidationError):
        memory_report(run={"x": value})


def test_nan_that_slipped_past_the_types_is_refused_on_writing_and_the_old_file_is_kept(tmp_path):
    path = tmp_path / "a.json"
    write_report(memory_report(), path)
    before = path.read_bytes()
    bad = memory_report()
    bad.results["phase1"] = bad.results["phase1"].model_copy(update={"memory_reduction_percent": math.nan})
    with pytest.raises(ValueError, match="finite"):
        write_report(bad, path)
    assert path.read_bytes() == before


def test_a_good_result_has_its_headline_number_and_a_failed_one_its_reason():
    with pytest.raises(ValidationError, match="peak_allocated_bytes"):
        MemoryResult(**common("phase1"))
    with pytest.raises(ValidationError, match="parameters"):
        MemoryResult(**common("phase1", parameters=None), peak_allocated_bytes=1)
    with pytest.raises(ValidationError, match="detail"):
        MemoryResult(**common("phase1", status="oom"))
    assert MemoryResult(**failed("phase1")).peak_allocated_bytes is None


def test_an_untrained_model_has_no_verdict():
    result = perplexity_result("phase1", 9000.0).model_dump()
    with pytest.raises(ValidationError, match="untrained"):
        type(perplexity_result("phase1", 1.0)).model_validate(result | {"untrained": True, "passes_5_percent_threshold": False})


def test_an_interval_may_be_a_list_of_two_numbers_and_nothing_else():
    assert Scaling(verdict="linear", exponent_ci95=[0.9, 1]).exponent_ci95 == (0.9, 1.0)
    for wrong in ([1.0], [1.0, 2.0, 3.0], ["1", "2"], [1.0, math.nan]):
        with pytest.raises(ValidationError):
            Scaling(verdict="linear", exponent_ci95=wrong)


@pytest.mark.parametrize(
    "make, key",
    [(memory_report, "phase1_htt16_ar32"), (perplexity_report, "phase1"), (memory_report, "../x"), (memory_report, "A")],
)
def test_results_have_the_names_of_the_schema(make, key):
    result = next(iter(make().results.values()))
    with pytest.raises(ValidationError, match="result is called"):
        make(results={key: result})


def test_a_result_of_another_kind_is_refused():
    with pytest.raises(ValidationError, match="memory are MemoryResult"):
        Report(kind="memory", environment={}, command="", results={"baseline": perplexity_result("baseline", 30.0)})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schema_version": 4}, ["schema_version up to 3", "got 4", "update phase1"]),
        ({"schema_version": 0}, ["schema_version 0"]),
        ({"schema_version": True}, ["schema_version True"]),
        ({"schema_version": 1.0}, ["schema_version 1.0"]),
        ({"kind": "perplexity"}, ["memory report", "kind 'perplexity'"]),
        ({"surprise": 1}, ["surprise"]),
        ({"checks": [{"name": "a"}]}, ["checks.0.value", "run phase1 memory again"]),
    ],
    ids=str,
)
def test_a_file_that_breaks_the_schema_is_refused_with_what_was_expected_found_and_helps(tmp_path, change, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(memory_report().model_dump() | change))
    message = refusal(path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"kind": "memory"}', "null", '{"results": {"phase1": {}}}'])
def test_a_file_of_another_program_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert "another program" in refusal(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "no readable file" in refusal(tmp_path / "missing.json")


def test_hostile_text_in_a_file_stays_on_one_line_of_the_message(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema_version": 1, "kind": "\x1b[2J\nx" * 100}))
    assert len(refusal(path)) < 600


def paths_of(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_of(item, (*path, key))


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_report_is_read_as_a_valid_one_or_refused_in_one_line(tmp_path, kind):
    rng = random.Random(kind)
    good = json.loads(all_reports()[kind].model_dump_json())
    places = list(paths_of(good))
    path = tmp_path / "a.json"
    refused = 0
    for _ in range(300):
        content = copy.deepcopy(good)
        *parents, last = rng.choice(places[1:])
        target = content
        for key in parents:
            target = target[key]
        target[last] = rng.choice([None, -1, 1e308, 10**400, "x", "", [], {}, True, [[]], {"a": 1}])
        text = json.dumps(content)
        path.write_text(text[: rng.randrange(len(text))] if rng.random() < 0.2 else text)
        try:
            read_report(path, kind)
        except ValueError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused > 100


def check(status):
    return Check(name="a", value=None, limit=None, status=status)


@pytest.mark.parametrize(
    "statuses, code",
    [([], 0), (["pass"], 0), (["pass", "inconclusive"], 3), (["inconclusive", "fail"], 1), (["fail", "pass"], 1)],
)
def test_the_exit_code_is_that_of_the_worst_check(statuses, code):
    assert exit_code([check(status) for status in statuses]) == code


def test_a_memory_result_keeps_its_breakdown():
    assert sum(memory_result("phase1", 1000).breakdown.values()) == 1000


def test_every_part_of_a_timeline_has_a_value_per_instant():
    with pytest.raises(ValidationError, match="2 values"):
        MemoryTimeline(events=9, phase_begins={"forward": 0}, at=[0, 5], parts={"activations": [1, 2], "rounding": [1]})
