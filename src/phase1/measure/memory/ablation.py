"""Who saved what: the peak memory of baseline and engine with one component changed at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from phase1.measure.memory.case import MemoryCase
from phase1.records.schema import Ablation, MemoryResult
from phase1.roster import ROLES

Measure = Callable[[str, MemoryCase], MemoryResult]

# a component of the engine, and the fields of ModelConfig that are it
COMPONENTS = {
    "loss": "loss",
    "checkpointing": "recompute",
    "mixer": "mixer",
    "table": "embedding",
    "copy head": "copy_head",
}
ROWS = 2 * (len(COMPONENTS) + 1)  # one more for the optimizer


def ablation(cases: Mapping[str, MemoryCase], results: Mapping[str, MemoryResult], measure: Measure) -> Iterator[Ablation]:
    """One row per component and role: alone switched on in `baseline`, then alone switched off in `phase1`.

    A component whose two changes are not opposite interacts with another: what one saves, the other need not save again.
    The optimizer is the same for both models, so it has no switch; its row is the peak without the optimizer's state,
    which is alive all the step: computed from the breakdown, not run.

    Args:
        cases, results: what was measured, by role, `baseline` and `phase1` among them.
        measure: the result of a case; called once per component and role.
    """
    for role, verb, source in (("baseline", "with", "phase1"), ("phase1", "without", "baseline")):
        reference = results[role].peak_allocated_bytes
        for component, name in COMPONENTS.items():
            value = getattr(cases[source].model, name)
            if value == getattr(cases[role].model, name):  # the run gave both the same, by --recompute none
                continue
            change: dict[str, Any] = {name: value}
            result = measure(role, replace(cases[role], model=replace(cases[role].model, **change)))
            detail = result.detail if result.status != "ok" else f"{name} = {value}"
            yield _row(f"{verb} the engine's {component}", role, result.peak_allocated_bytes, reference, detail)
        state = results[role].breakdown.get("optimizer_state")
        if reference is not None and state is not None:
            yield _row("without optimizer state", role, reference - state, reference, "computed: it is alive all the step")


def _row(name: str, role: str, peak: int | None, reference: int | None, detail: str) -> Ablation:
    change = None if peak is None or reference is None else peak - reference
    return Ablation(name=name, from_role=role, peak_allocated_bytes=peak, change_bytes=change, detail=detail)


assert set(COMPONENTS.values()) == set(ROLES["phase1"]), "every field in which the roles differ is a component"
