import math

import numpy as np
import pytest

from phase1.checks.perplexity import compared, quality_checks
from phase1.records.schema import Dataset, PerplexityResult, exit_code
from tests.reports import common

TEXT = Dataset(name="text", split="valid", sha256="a" * 64)
RNG = np.random.default_rng(0)
LOSSES = RNG.normal(400, 20, 50)


def result(key, ratio=1.0, **changes):
    """A model whose perplexity is `ratio` times the baseline's, on 50 windows of 100 tokens."""
    nll = LOSSES + 100 * math.log(ratio) + (RNG.normal(0, 0.05, 50) if ratio != 1 else 0)
    config = {"htt_rank": 16, "ar_ssm_max_rank": 32}
    return PerplexityResult(
        **common("phase1") | {"model_name": key, "config": config, "config_id": key},
        perplexity=math.exp(nll.sum() / 5000), trained_tokens=1000, trained_on=TEXT, protocol_hash="p",
        window_nll_nats=nll.tolist(), window_tokens=[100] * 50, effective_rank=20.0,
    ).model_copy(update=changes)  # fmt: skip


def checks_of(*results):
    found = compared({r.model_name: r for r in results}, 512)
    return found, {check.name: check for check in quality_checks(found, 512)}


def test_the_limit_belongs_to_the_claim():
    found, checks = checks_of(result("baseline"), result("phase1_htt16_ar32", 1.04), result("ar_ssm_dense", 1.04), result("equal_parameters", 0.99))
    assert found["phase1_htt16_ar32"].ppl_degradation_percent == pytest.approx(4, abs=0.1)
    assert {name: check.status for name, check in checks.items()} == {
        "phase1_htt16_ar32_within_5_percent": "pass", "ar_ssm_dense_within_3_percent": "fail", "equal_parameters_within_0_percent": "pass",
    }  # fmt: skip


WHY = "expected no leak; got one; mask the future"
UNSOUND = {"status": "error", "detail": f"--model a:b@0123456789ab may not be scored: {WHY}", "unsound": WHY}


def failed_result(key, detail):
    return result(key).model_copy(update={"status": "error", "detail": detail})


def test_a_model_that_sees_the_future_fails_and_what_is_compared_with_it_is_undecided():
    """Any other error decides nothing."""
    _, checks = checks_of(result("baseline"), result("mine").model_copy(update=UNSOUND), failed_result("other", "RuntimeError: x"))
    mine, other = checks["mine_within_5_percent"], checks["other_within_5_percent"]
    assert (mine.status, mine.value, mine.detail) == ("fail", None, WHY)
    assert other.status == "inconclusive" and other.detail == "other: RuntimeError: x"
    assert exit_code(checks.values()) == 1
    _, checks = checks_of(result("baseline").model_copy(update=UNSOUND), result("mine"))
    assert {name: check.status for name, check in checks.items()} == {
        "baseline_may_be_scored": "fail", "mine_within_5_percent": "inconclusive",
    }  # fmt: skip


def test_the_mean_of_seeds_of_such_a_model_has_no_verdict():
    seeds = ("", "_seed1")
    models = [result(f"baseline{seed}") for seed in seeds] + [result("mine"), result("mine_seed1").model_copy(update=UNSOUND)]
    _, checks = checks_of(*models)
    assert checks["mine_seed1_within_5_percent"].status == "fail"
    mean = checks["mine_mean_of_seeds_within_5_percent"]
    assert mean.status == "inconclusive" and mean.detail == "1 of 2 seeds have no verdict"


def test_each_seed_is_compared_with_its_own_baseline_and_the_mean_decides_apart():
    seeds = ("", "_seed1", "_seed2")
    models = [result(f"baseline{seed}", 1 + 0.5 * i) for i, seed in enumerate(seeds)]
    models += [result(f"phase1_htt16_ar32{seed}", (1 + 0.5 * i) * r) for i, (seed, r) in enumerate(zip(seeds, (1.06, 1.03, 1.0)))]
    _, checks = checks_of(*models)
    singles = [checks[f"phase1_htt16_ar32{seed}_within_5_percent"] for seed in seeds]
    assert [check.status for check in singles] == ["fail", "pass", "pass"]
    mean = checks["phase1_htt16_ar32_mean_of_seeds_within_5_percent"]
    assert mean.status == "pass" and mean.value == pytest.approx(100 * ((1.06 * 1.03) ** (1 / 3) - 1), abs=0.1)
    assert "3 seeds" in mean.detail
    _, checks = checks_of(*models[:2], models[3], models[4].model_copy(update={"untrained": True}))
    assert checks["phase1_htt16_ar32_mean_of_seeds_within_5_percent"].status == "inconclusive"


@pytest.mark.parametrize("ratio, rank, expected", [(1.005, 15.0, ["pass", "pass"]), (1.02, 16.1, ["fail", "fail"])])
def test_the_gate_is_judged_against_the_engine_without_it(ratio, rank, expected):
    engine = result("phase1_htt16_ar32", ratio, effective_rank=rank)
    _, checks = checks_of(result("no_gate"), engine)
    gate = [checks["gate_costs_at_most_1_percent"], checks["effective_rank_at_most_half"]]
    assert [check.status for check in gate] == expected and gate[1].limit == 16
    assert checks["phase1_htt16_ar32_within_5_percent"].status == "inconclusive"


def test_the_gate_is_judged_over_its_seeds_too():
    seeds, ratios = ("", "_seed1", "_seed2"), (0.997, 1.014, 1.004)
    models = [result(f"no_gate{seed}", 1 + 0.5 * i) for i, seed in enumerate(seeds)]
    models += [result(f"phase1_htt16_ar32{seed}", (1 + 0.5 * i) * r) for i, (seed, r) in enumerate(zip(seeds, ratios))]
    _, checks = checks_of(*models)
    assert [checks[f"gate_costs_at_most_1_percent{seed}"].status for seed in seeds] == ["pass", "fail", "pass"]
    mean = checks["gate_costs_mean_of_seeds_within_1_percent"]
    assert mean.status == "pass" and mean.value == pytest.approx(100 * (math.prod(ratios) ** (1 / 3) - 1), abs=0.1)
    assert "with all ranks on, geometric mean of 3 seeds" in mean.detail
    _, checks = checks_of(*models[:2], models[3])
    assert checks["gate_costs_mean_of_seeds_within_1_percent"].status == "inconclusive"
    assert "gate_costs_mean_of_seeds_within_1_percent" not in checks_of(models[0], models[3])[1]


def test_a_gate_without_its_engine_or_with_another_protocol_is_undecided():
    for others in ([], [result("phase1_htt16_ar32", 1.0, protocol_hash="q")]):
        _, checks = checks_of(result("no_gate"), *others)
        assert {checks[n].status for n in ("gate_costs_at_most_1_percent", "effective_rank_at_most_half")} == {"inconclusive"}
