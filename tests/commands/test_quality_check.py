"""When two perplexities are compared, and what the check says; no model is trained."""

import pytest

from phase1.checks.perplexity import compared, quality_checks
from phase1.measure.perplexity import result as one_case
from phase1.measure.perplexity.candidates import candidates
from phase1.records.schema import Dataset
from phase1.runs import PerplexityRun
from tests.reports import perplexity_result

LOSSES = {"window_nll_nats": [10.0, 12.0, 11.0], "window_tokens": [5, 5, 5]}


def pair(engine=None, baseline=None):
    """Results of both models, the engine compared with the baseline."""
    results = {
        "baseline": perplexity_result("baseline", 30.0, **(LOSSES | (baseline or {}))),
        "phase1": perplexity_result("phase1", 31.0, **(LOSSES | (engine or {}))),
    }
    return compared(results, 512)["phase1"], results["baseline"]


def checked(engine, baseline):
    (check,) = quality_checks({"phase1": engine} | ({} if baseline is None else {"baseline": baseline}), 512)
    return check


@pytest.mark.parametrize("extra, status", [(0.0, "pass"), (0.7, "pass"), (0.8, "fail"), (-1.0, "pass")])
def test_the_estimate_decides_against_5_percent(extra, status):
    engine, baseline = pair({"window_nll_nats": [10.0, 12.0, 11.0 + extra]})  # 15 targets: exp(extra / 15) - 1
    check = checked(engine, baseline)
    assert (check.name, check.status, check.limit) == ("phase1_within_5_percent", status, 5.0)
    assert check.value == engine.ppl_degradation_percent and "95 % interval" in check.detail


def test_one_window_has_a_verdict_and_no_interval():
    one = {"window_nll_nats": [10.0], "window_tokens": [5]}
    engine, baseline = pair(one, one)
    assert engine.degradation_ci95 is None and "from one window: no interval" in checked(engine, baseline).detail


@pytest.mark.parametrize(
    "change",
    [{"trained_tokens": 1}, {"trained_on": Dataset(name="x", split="train", sha256="0")}, {"protocol_hash": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_other_tokens_training_data_or_protocol_leave_it_undecided_and_named(change):
    engine, baseline = pair(change)
    check = checked(engine, baseline)
    assert (check.status, check.value, engine.passes_5_percent_threshold) == ("inconclusive", None, None)
    assert check.detail.startswith(f"{next(iter(change))} differ: ")


@pytest.mark.parametrize("side", ["engine", "baseline"])
def test_a_model_that_failed_or_learned_nothing_leaves_it_undecided(side):
    for change, words in (
        ({"status": "oom", "detail": "out of memory"}, "out of memory"),
        ({"untrained": True}, "train it on"),
    ):
        check = checked(*pair(**{side: change}))
        assert check.status == "inconclusive" and words in check.detail


def test_without_a_baseline_there_is_nothing_to_compare():
    engine = perplexity_result("phase1", 30.0)
    assert compared({"phase1": engine}, 512) == {"phase1": engine}
    assert checked(engine, None).detail == "no baseline in this run"


def test_a_failure_of_the_model_itself_is_said_before_the_missing_baseline():
    engine, _ = pair(engine={"status": "error", "detail": "a loss of 1e9 nats"})
    assert checked(engine, None).detail.endswith("a loss of 1e9 nats")


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("an illegal memory access"), KeyboardInterrupt()], ids=repr)
def test_an_error_other_than_too_little_memory_ends_the_run(monkeypatch, error):
    def fails(*args):
        raise error

    run = PerplexityRun()
    model = candidates(run)[0]
    monkeypatch.setattr(one_case, "train_model", fails)
    with pytest.raises(type(error)):
        one_case.measure(run, model, [one_case.ScoredText(None, None)])


def test_models_with_attention_have_their_own_learning_rate(monkeypatch, tmp_path):
    from types import SimpleNamespace

    seen = {}
    monkeypatch.setattr(one_case, "train_to_checkpoint", lambda model, train, *rest, label: seen.update({label: train}))
    run = PerplexityRun(
        learning_rate=1e-3, baseline_learning_rate=2e-3, checkpoint_dir=str(tmp_path), variants=("attention_htt", "ar_ssm_dense")
    )
    corpus = SimpleNamespace(splits={"train": SimpleNamespace(sha256="0")}, tokenizer=SimpleNamespace(fingerprint="0"))
    for model in candidates(run):
        one_case.train_model(run, model, corpus)
    rates = {key: train.learning_rate for key, train in seen.items()}
    assert rates == {"baseline": 2e-3, "attention_htt": 2e-3, "phase1_htt16_ar32": 1e-3, "ar_ssm_dense": 1e-3}
