"""The table of targets decides by records alone."""

import json

import pytest

from phase1.tables.targets import NOT_MEASURED, targets_table

STEPS = {
    "rows": [
        {"role": "fast", "T": 512, "settings": {}, "tokens_per_s": 100.0},
        {"role": "phase1", "T": 512, "settings": {}, "tokens_per_s": 80.0},
        {"role": "phase1", "T": 512, "settings": {"htt_output": "two_level"}, "tokens_per_s": 121.0},
    ],
    "peak": {"bytes": 2e9},
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
    return targets_table(tmp_path, {"name": "t", "caption": "c", "targets": [{"what": "speed"} | target]}).rows[0]


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
        ({"at_least": 2e9, "value": {"record": "steps.json", "rows": "", "where": {}, "pick": "most", "key": "bytes"}}, "2,000,000,000", "PASS"),
        ({"at_least": 0, "value": at("long.tokens_per_s"), "over": at("peak.bytes")}, "failed", "FAIL"),
        ({"at_most": 2, "value": at("noise.two"), "over": at("noise.one")}, "0", "PASS"),
        ({"at_most": 2, "value": at("noise.three"), "over": at("noise.one")}, "inf", "FAIL"),
        ({"at_least": 1, "value": {"record": "none.json", "key": "x"}}, NOT_MEASURED, NOT_MEASURED),
        ({"at_least": 1, "value": place("nobody")}, NOT_MEASURED, NOT_MEASURED),
        ({"at_least": 1, "value": place(key="seconds")}, NOT_MEASURED, NOT_MEASURED),
        ({"at_least": 1, "value": place(), "over": place("nobody")}, NOT_MEASURED, NOT_MEASURED),
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


def test_a_miss_is_seen_in_the_digits(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"ms": 10.518}))
    target = {"what": "w", "at_most": 10.5, "value": {"record": "a.json", "key": "ms"}}
    assert targets_table(tmp_path, {"name": "n", "caption": "c", "targets": [target]}).rows[0][3:] == ("10.52", "FAIL")
