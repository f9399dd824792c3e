"""The table of targets decides by records alone."""

import json

import pytest

from phase1.errors import exit_status
from phase1.tables.targets import NOT_MEASURED, targets_table

STEPS = {
    "rows": [
        {"role": "fast", "T": 512, "settings": {}, "tokens_per_s": 100.0},
        {"role": "phase1", "T": 512, "settings": {}, "tokens_per_s": 80.0},
        {"role": "phase1", "T": 512, "settings": {"htt_output": "two_level"}, "tokens_per_s": 121.0},
    ],
    "peak": {"bytes": 2e9},
    "peaks": {"a": {"bytes": 1e9}, "b": {"bytes": 2e9}, "c": {"failed": "out of memory"}, "d": {"bytes": None, "of": "d"}},
    "long": {"failed": "out of memory"},
    "noise": {"one": 0.0, "two": 0.0, "three": 0.1},
}


def place(role="phase1", settings=None, **more):
    where = {"role": role, "T": 512, "settings": settings or {}}
    return {"record": "steps.json", "rows": "rows", "where": where, "key": "tokens_per_s"} | more


def at(key):
    return {"record": "steps.json", "key": key}


def row(tmp_path, **target):
    (tmp_path / "steps.json").write_text(json.dumps(STEPS))
    entry = {"name": "t", "caption": "c", "targets": [{"what": "speed"} | target]}
    return targets_table(tmp_path, entry, "results/targets.toml").rows[0]


@pytest.mark.parametrize(
    "target, measured, verdict",
    [
        ({"at_least": 0.9, "goal": 1.25, "value": place(), "over": place("fast")}, "0.8", "FAIL"),
        ({"at_least": 0.8, "value": place(), "over": place("fast")}, "0.8", "PASS"),
        ({"at_most": -15, "value": place(), "over": place("fast"), "percent": True, "unit": "%"}, "-20 %", "PASS"),
        ({"at_most": 1.5, "value": {"record": "steps.json", "key": "peak.bytes", "scale": 1e-9}, "unit": "GB"}, "2 GB", "FAIL"),
        (
            {"at_least": 1, "value": [place(), place(settings={"htt_output": "two_level"})], "over": [place("fast")] * 2},
            "0.984",  # sqrt(0.8 · 1.21)
            "FAIL",
        ),
        ({"at_most": 80, "value": place() | {"where": {"T": 512}, "starts": {"role": "ph"}, "pick": "least"}}, "80", "PASS"),
        ({"at_least": 2e9, "value": {"record": "steps.json", "rows": "peaks", "pick": "most", "key": "bytes"}}, "2,000,000,000", "PASS"),
        ({"at_least": 0, "value": at("long.tokens_per_s"), "over": at("peak.bytes")}, "failed", "FAIL"),
        ({"at_most": 2, "value": at("noise.two"), "over": at("noise.one")}, "0", "PASS"),
        ({"at_most": 2, "value": at("noise.three"), "over": at("noise.one")}, "inf", "FAIL"),
        ({"at_least": 1, "value": {"record": "none.json", "key": "x"}}, NOT_MEASURED, NOT_MEASURED),
        ({"at_least": 1, "value": place(), "over": {"record": "none.json", "key": "x"}}, NOT_MEASURED, NOT_MEASURED),
        ({"at_least": 1, "value": at("peaks.d.bytes")}, NOT_MEASURED, NOT_MEASURED),
        ({"at_most": 1, "value": {"record": "steps.json", "rows": "peaks", "where": {"failed": "out of memory"}, "key": "bytes"}}, "failed", "FAIL"),
        ({"at_most": 1, "value": at("long.x"), "over": at("noise.one")}, "failed", "FAIL"),
    ],
)
def test_a_target_is_held_or_not_by_what_the_record_says(tmp_path, target, measured, verdict):
    assert row(tmp_path, **target)[-2:] == (measured, verdict)


def test_limits_and_goals_say_on_which_side_they_are(tmp_path):
    assert row(tmp_path, at_least=0.9, goal=1.25, value=place(), over=place("fast"))[1:3] == ("≥ 0.9", "≥ 1.25")
    assert row(tmp_path, at_most=3, unit="%", value=place(), over=place("fast"), percent=True)[1:3] == ("≤ 3 %", None)


def test_a_place_that_fits_several_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one row where .* got 2"):
        row(tmp_path, at_least=1, value=place() | {"where": {"role": "phase1"}})


@pytest.mark.parametrize(
    "target, message",
    [({"at_least": 1, "value": place("nobody")}, r"value: steps\.json: expected a row where .*nobody.*; got none in 3 rows"),
     ({"at_least": 1, "value": place(), "over": place("nobody")}, r"over: steps\.json: expected a row where .*nobody"),
     ({"at_least": 1, "value": place(key="seconds")}, r"value: steps\.json, row 2: expected the key seconds; got none"),
     ({"at_least": 1, "value": place(rows="row")}, r"steps\.json: expected the key row; got none"),
     ({"at_least": 1, "value": place(rows="peak.bytes")}, r"steps\.json, peak\.bytes: expected a list"),
     ({"at_least": 1, "value": at("peak.byte")}, r"value: steps\.json: expected the key peak\.byte; got none"),
     ({"at_least": 1, "value": at("long")}, r"value: steps\.json, long: expected a number; got {"),
     ({"at_least": 1, "value": at("peak.bytes") | {"where": {}}}, "value: expected rows, of which where"),
     ({"at_least": 1, "value": place(pick="last")}, "value, pick: expected least or most; got 'last'"),
     ({"at_least": 1, "value": place(wher={})}, r"value: no key is called wher; did you mean where\?"),
     ({"at_least": 1, "value": place(starts={"role": 1})}, "value, starts, role: expected text; got 1"),
     ({"at_least": 1, "value": {"key": "x"}}, "value: expected the key record; got key"),
     ({"at_least": 1, "value": 3}, "value: expected a table; got 3"),
     ({"at_least": 1, "value": []}, "expected as many places over as of the value; got 0, 0"),
     ({"at_least": 1, "value": [place()], "over": []}, "expected as many places over as of the value; got 1, 0"),
     ({"at_least": 1}, "expected the key value; got what, at_least"),
     ({"value": place()}, "expected a limit, at_least or at_most; got none"),
     ({"at_least": 1, "at_most": 2, "value": place()}, "expected a limit, at_least or at_most; got both"),
     ({"at_leest": 1, "value": place()}, r"no key is called at_leest; did you mean at_least\?"),
     ({"at_least": "0.9", "value": place()}, "at_least: expected a number; got '0.9'"),
     ({"at_least": float("nan"), "value": place()}, "at_least: expected a number; got nan"),
     ({"at_least": 1, "percent": 1, "value": place()}, "percent: expected true or false; got 1"),
     ({"at_least": 1, "value": [place(), at("noise.one")]}, "expected a geometric mean of numbers above 0; got 0")],
)  # fmt: skip
def test_a_wrong_target_is_named_and_not_taken_for_one_that_is_not_measured(tmp_path, target, message):
    with pytest.raises(ValueError, match=r"^results/targets\.toml: target 1 \(speed\).*" + message) as failure:
        row(tmp_path, **target)
    assert exit_status(failure.value) == 2


def test_a_miss_is_seen_in_the_digits(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"ms": 10.518}))
    target = {"what": "w", "at_most": 10.5, "value": {"record": "a.json", "key": "ms"}}
    assert targets_table(tmp_path, {"name": "n", "caption": "c", "targets": [target]}, "f").rows[0][3:] == ("10.52", "FAIL")
