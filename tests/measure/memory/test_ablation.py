from dataclasses import replace

import pytest

from phase1.config import EngineShape
from phase1.measure.memory.ablation import COMPONENTS, ROWS, ablation
from phase1.measure.memory.case import MemoryCase
from phase1.records.schema import MemoryResult
from phase1.roster import ROLES, model_config

SMALL = EngineShape(vocab_size=3000, d_model=64, n_layers=2, n_heads=2, htt_dense_rows=256, htt_groups=64)
CASES = {role: MemoryCase(model_config(role, SMALL), 2, 128) for role in ROLES}
COST = {"loss": {"materialized": 500}, "recompute": {"none": 300}, "mixer": {"ar_ssm": 40}, "embedding": {"dense": 90}}


def result(role, peak, **changes):
    fields = {"model_name": role, "config": {}, "config_id": "0", "status": "ok", "basis": "measured"}
    fields |= {"parameters": {"total": 1, "embedding": 1, "mixer": 0, "mlp": 0}, "peak_allocated_bytes": peak}
    return MemoryResult.model_validate(fields | {"breakdown": {"optimizer_state": 7}} | changes)


def measured(role, case):
    """A peak to which every component adds its own: there are no interactions."""
    return result(role, 1000 + sum(costs.get(getattr(case.model, name), 0) for name, costs in COST.items()))


RESULTS = {role: measured(role, case) for role, case in CASES.items()}


def test_each_component_is_changed_alone_and_takes_what_it_costs():
    seen = []
    rows = list(ablation(CASES, RESULTS, lambda role, case: seen.append((role, case)) or measured(role, case)))
    assert len(rows) == ROWS and len(seen) == 2 * len(COMPONENTS)
    for role, case in seen:
        changed = [name for name in COMPONENTS.values() if getattr(case.model, name) != getattr(CASES[role].model, name)]
        assert len(changed) == 1
        restored = replace(case.model, **{name: getattr(CASES[role].model, name) for name in changed})
        assert replace(case, model=restored) == CASES[role]
    changes = {(row.from_role, row.name): row.change_bytes for row in rows}
    assert changes["baseline", "with the engine's loss"] == -500 == -changes["phase1", "without the engine's loss"]
    assert changes["baseline", "with the engine's mixer"] == 40 == -changes["phase1", "without the engine's mixer"]
    assert changes["phase1", "without the engine's table"] == 90
    assert changes["baseline", "without optimizer state"] == changes["phase1", "without optimizer state"] == -7


def test_a_variant_that_does_not_fit_is_a_row_with_the_reason():
    def fails(role, case):
        return result(role, None, status="oom", detail="out of memory", parameters=None)

    row = next(iter(ablation(CASES, RESULTS, fails)))
    assert (row.peak_allocated_bytes, row.change_bytes, row.detail) == (None, None, "out of memory")


def test_a_model_that_was_not_measured_has_no_changes():
    results = RESULTS | {"baseline": result("baseline", None, status="error", detail="boom", parameters=None, breakdown={})}
    rows = [row for row in ablation(CASES, results, measured) if row.from_role == "baseline"]
    assert len(rows) == len(COMPONENTS)
    assert {row.change_bytes for row in rows} == {None} and rows[0].peak_allocated_bytes is not None


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_a_component_that_both_have_is_left_out(role):
    same = {r: replace(case, model=replace(case.model, recompute="none")) for r, case in CASES.items()}
    names = [row.name for row in ablation(same, RESULTS, measured) if row.from_role == role]
    assert len(names) == len(COMPONENTS) and not any("checkpointing" in name for name in names)
