import json
import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phase1.cli import parse
from phase1.commands import perplexity, train
from phase1.config import PerplexityRun, TrainRun
from phase1.errors import Unavailable
from phase1.record import read_report

FILE = "phase1_perplexity_validation.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus with structure: sentences from a small grammar, so that a model beats the unigram entropy quickly."""
    path = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    subjects, verbs, objects = ["the cat", "a dog", "my neighbour"], ["sees", "chases", "feeds"], ["birds", "mice", "children"]

    def text(lines):
        return "".join(f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)} today .\n" for _ in range(lines))

    (path / "train.txt").write_text(text(1500))
    (path / "valid.txt").write_text(text(60))
    return path


@pytest.fixture
def run(folder, tmp_path):
    return PerplexityRun(
        dataset_name=str(folder), tokenizer="bpe", cache_dir=str(tmp_path / "cache"), out_dir=str(tmp_path / "out"),
        checkpoint_dir=str(tmp_path / "checkpoints"), vocab_size=300, d_model=16, n_layers=1, n_heads=2, ar_ssm_min_rank=2,
        ar_ssm_window=4, htt_dense_rows=20, htt_groups=10, test_htt_ranks=(2, 3), test_ar_ssm_ranks=(4,), seq_length=32,
        train_tokens=16 * 32 * 40, train_batch_size=16, micro_batch_size=16, learning_rate=1e-2,
    )  # fmt: skip


def test_models_are_trained_once_and_compared_on_the_same_targets(run, capsys, monkeypatch):
    code = perplexity.main(run)
    first = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert list(first.results) == ["baseline", "phase1_htt2_ar4", "phase1_htt3_ar4"]
    assert {r.trained_tokens for r in first.results.values()} == {run.train_tokens}
    assert len({r.protocol_hash for r in first.results.values()}) == 1
    assert len({r.config_id for r in first.results.values()}) == 3
    valid = Path(run.dataset_name, "valid.txt").read_text()
    for result in first.results.values():
        assert not result.untrained and result.byte_count == len(valid.encode())
        assert result.word_count == len(valid.split()) + valid.count("\n")
        assert sum(result.window_tokens) == result.token_count
    engine, baseline = first.results["phase1_htt3_ar4"], first.results["baseline"]
    ratio = engine.perplexity / baseline.perplexity
    assert engine.ppl_degradation_percent == pytest.approx(100 * (ratio - 1), abs=1e-6)
    assert code == (0 if all(c.status == "pass" for c in first.checks) else 1)
    assert "phase1_htt3_ar4" in capsys.readouterr().out

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "make_state", fail)
    perplexity.main(run)
    second = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert second.results == first.results

    monkeypatch.undo()
    folders = {key: next(iter(Path(run.checkpoint_dir).glob(f"{key}-*"))) for key in first.results}
    loaded = replace(run, checkpoint=tuple(f"{k}={v}" for k, v in folders.items()), batch_size=3, max_samples=5)
    perplexity.main(loaded)
    third = read_report(f"{run.out_dir}/{FILE}", "perplexity").results
    assert third["baseline"].token_count == 5 * 32
    assert third["baseline"].protocol_hash != first.results["baseline"].protocol_hash
    assert third["baseline"].window_nll_nats == pytest.approx(first.results["baseline"].window_nll_nats[:5], rel=1e-5)
    with pytest.raises(ValueError, match="the model there is baseline; use that name"):
        perplexity.main(replace(run, checkpoint=(f"phase1_htt2_ar4={folders['baseline']}",)))


def test_a_model_that_learned_nothing_is_untrained_and_undecided(run):
    short = replace(run, train_tokens=512, learning_rate=1e-6, test_htt_ranks=(2,))
    assert perplexity.main(short) == 3
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    engine = report.results["phase1_htt2_ar4"]
    assert engine.untrained and engine.ppl_degradation_percent is None and engine.passes_5_percent_threshold is None
    assert report.checks[0].status == "inconclusive" and "unigram" in report.checks[0].detail


def test_without_a_baseline_there_is_no_verdict(run):
    assert perplexity.main(replace(run, baseline=False, test_htt_ranks=(2,), train_tokens=2048)) == 3
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert list(report.results) == ["phase1_htt2_ar4"] and report.checks[0].detail == "no baseline in this run"


def test_an_interrupted_training_goes_on_where_it_stopped(run, monkeypatch, tmp_path):
    whole = replace(run, baseline=False, test_htt_ranks=(2,), train_tokens=16 * 32 * 6)
    perplexity.main(whole)
    expected = json.loads(Path(run.out_dir, FILE).read_text())["results"]["phase1_htt2_ar4"]["window_nll_nats"]
    again = replace(whole, checkpoint_dir=str(tmp_path / "again"))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    steps = train.train

    def interrupted(state, batch_at, total, on_step):
        def stop(step, loss):
            on_step(step, loss)
            if step == 4:
                raise KeyboardInterrupt

        return steps(state, batch_at, total, stop)

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perplexity.main(again)
    seen = []
    monkeypatch.setattr(train, "train", lambda state, *rest: seen.append(state.step) or steps(state, *rest))
    perplexity.main(again)
    assert seen == [4]
    assert json.loads(Path(run.out_dir, FILE).read_text())["results"]["phase1_htt2_ar4"]["window_nll_nats"] == expected


def test_a_baseline_is_shared_by_engines_of_different_ranks(run):
    short = replace(run, train_tokens=1024)
    for ranks in ((2,), (3,)):
        perplexity.main(replace(short, test_htt_ranks=ranks))
    assert sorted(p.name.rsplit("-")[0] for p in Path(run.checkpoint_dir).iterdir()) == [
        "baseline",
        "phase1_htt2_ar4",
        "phase1_htt3_ar4",
    ]


def test_the_table_knows_only_the_tokens_its_model_is_trained_on(run, monkeypatch):
    seen = []
    statistics = train.token_statistics
    monkeypatch.setattr(train, "token_statistics", lambda ids, **sizes: seen.append(len(ids)) or statistics(ids, **sizes))
    perplexity.main(replace(run, test_htt_ranks=(2,), train_tokens=16 * 32 * 2, baseline=False))
    assert seen == [2 * 16 * 33]  # windows of 32 and their last targets


@pytest.mark.parametrize("value", ["baseline", "x=y", "phase1_htt16=z"])
def test_a_wrong_checkpoint_argument_is_named(run, value):
    with pytest.raises(ValueError, match="must be NAME=PATH"):
        perplexity.main(replace(run, checkpoint=(value,)))


def settings_of(run, **changes):
    shared = {name: getattr(run, name) for name in TrainRun.__dataclass_fields__ if hasattr(run, name)}
    return TrainRun(**(shared | {"htt_rank": 2, "ar_ssm_max_rank": 4, "train_tokens": 4096} | changes))


def test_train_writes_a_checkpoint_and_prints_the_command_that_evaluates_it(run, capsys, tmp_path):
    assert train.main(settings_of(run, out_dir=str(tmp_path / "mine"))) == 0
    out = capsys.readouterr().out
    assert "trained on 4,096 tokens" in out
    command = shlex.split(out.split("next: phase1 perplexity ")[1])
    evaluation = parse("perplexity", [*command, "--out-dir", run.out_dir])
    assert perplexity.main(evaluation) == 3  # one model, nothing to compare it with
    result = read_report(f"{run.out_dir}/{FILE}", "perplexity").results["phase1_htt2_ar4"]
    assert result.trained_tokens == 4096 and result.training["train_tokens"] == 4096


def test_a_finished_checkpoint_of_other_settings_is_not_taken_for_this_one(run, tmp_path):
    train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512))
    with pytest.raises(ValueError, match="made with other --seed; use those"):
        train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512, seed=3))


def test_a_variant_can_be_trained_alone_and_evaluated_under_its_name(run, tmp_path, capsys):
    train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512, embedding="dense"))
    assert f"--checkpoint ar_ssm_dense={tmp_path / 'mine'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model there is ar_ssm_dense; use that name"):
        perplexity.main(replace(run, checkpoint=(f"baseline={tmp_path / 'mine'}",)))


def test_variants_and_repetitions_are_trained_and_compared_with_the_baseline_of_their_seed(run):
    variants = ("ar_ssm_dense", "attention_htt", "no_gate", "equal_parameters")
    short = replace(run, variants=variants, repeats=2, test_htt_ranks=(2,), train_tokens=16 * 32 * 25)
    assert perplexity.main(short) in (0, 1)
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    plain = ["baseline", "phase1_htt2_ar4", *variants]
    assert list(report.results) == plain + [f"{key}_seed1" for key in plain]
    assert [r.training["seed"] for r in report.results.values()] == [0] * 6 + [1] * 6
    first, again = report.results["phase1_htt2_ar4"], report.results["phase1_htt2_ar4_seed1"]
    assert first.perplexity != again.perplexity and first.config_id == again.config_id
    expected = again.perplexity / report.results["baseline_seed1"].perplexity
    assert again.ppl_degradation_percent == pytest.approx(100 * (expected - 1), abs=1e-6)
    names = {check.name for check in report.checks}
    assert {
        "ar_ssm_dense_within_3_percent", "equal_parameters_seed1_within_0_percent", "gate_costs_at_most_1_percent",
        "effective_rank_at_most_half_seed1", "phase1_htt2_ar4_mean_of_seeds_within_5_percent",
    } <= names and "no_gate_within_5_percent" not in names  # fmt: skip


def test_a_model_that_runs_out_of_memory_is_recorded_and_the_others_go_on(run, monkeypatch):
    evaluate = perplexity.evaluate_checkpoint

    def full(run, key, *rest):
        if key == "baseline":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return evaluate(run, key, *rest)

    monkeypatch.setattr(perplexity, "evaluate_checkpoint", full)
    assert perplexity.main(replace(run, test_htt_ranks=(2,))) == 3
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert report.results["baseline"].status == "oom" and "try --micro-batch-size 8" in report.results["baseline"].detail
    assert report.results["phase1_htt2_ar4"].perplexity and "out of memory" in report.checks[0].detail


def test_out_of_memory_in_training_ends_with_sizes_to_try(run, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train", full)
    with pytest.raises(Unavailable, match="try --micro-batch-size 8"):
        train.main(settings_of(run, out_dir=str(tmp_path / "mine")))
