import hashlib
import json
import math
import random
import shlex
import shutil
import signal
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phase1.cli import parse
from phase1.commands import perplexity, train
from phase1.data import load_corpus
from phase1.data.tokenizer_files import gpt2_tokenizer
from phase1.errors import Diverged, Unavailable
from phase1.measure.perplexity import result as one_case
from phase1.measure.perplexity.evaluate import Evaluation
from phase1.ops.self_check import DISPROVEN
from phase1.page import page
from phase1.records.schema import read_report
from phase1.runs import PerplexityRun, TrainRun
from phase1.stats.perplexity_ratio import paired_ratio_interval
from phase1.training import job
from phase1.training.checkpoint import INDEX, load_token_order

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
        baseline_learning_rate=1e-2, verbose=True,
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

    monkeypatch.setattr(job, "make_state", fail)
    perplexity.main(run)
    second = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert second.results == first.results

    monkeypatch.undo()
    folders = {key: next(iter(Path(run.checkpoint_dir).glob(f"{key}-*"))) for key in first.results}
    loaded = replace(run, checkpoint=tuple(f"{k}={v}" for k, v in folders.items()), batch_size=3, max_samples=5)
    perplexity.main(loaded)
    third = read_report(f"{run.out_dir}/{FILE}", "perplexity").results
    assert third["baseline"].token_count == 5 * 32
    (weights,) = folders["baseline"].glob("model-*.safetensors")
    assert third["baseline"].weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert third["baseline"].protocol_hash != first.results["baseline"].protocol_hash
    assert third["baseline"].window_nll_nats == pytest.approx(first.results["baseline"].window_nll_nats[:5], rel=1e-5)
    with pytest.raises(ValueError, match="the model there is baseline; use that name"):
        perplexity.main(replace(run, checkpoint=(f"phase1_htt2_ar4={folders['baseline']}",)))


def test_a_record_says_which_kernels_scored_and_warns_of_each_that_failed_its_check(run, monkeypatch):
    """Also of a model that an interrupted run has scored: what has failed is in its result."""
    asked = []
    monkeypatch.setattr(one_case, "runs_kernels", lambda tensor, dtype=None: bool(asked.append(dtype)) or len(asked) > 1)
    short = replace(run, train_tokens=512, test_htt_ranks=(2,), precision="bf16")
    perplexity.main(short)
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert [result.kernels for result in report.results.values()] == ["torch", "triton"]
    assert asked == [torch.bfloat16] * 2 and report.warnings == []  # asked of the type that the products have
    with monkeypatch.context() as failed:
        for name in ("AR-SSM", "copy head"):
            failed.setitem(DISPROVEN, name, f"relative error 1 of {name}")
        failed.setattr(perplexity.Session, "close", lambda self: None)
        perplexity.main(short)
    perplexity.main(replace(short, resume=True))
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert report.warnings == [
        f"kernels of {name} failed their check (relative error 1 of {name}): PyTorch's operators ran"
        for name in ("AR-SSM", "copy head")
    ]
    assert "kernels of AR-SSM failed" in page({"perplexity": report}, title="x")


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


def losses_of(run):
    return json.loads(Path(run.out_dir, FILE).read_text())["results"]["phase1_htt2_ar4"]["window_nll_nats"]


def trained_whole(run, tmp_path):
    """A short run, to be interrupted, and the losses of the same run when it is not."""
    whole = replace(run, baseline=False, test_htt_ranks=(2,), train_tokens=16 * 32 * 6)
    perplexity.main(whole)
    return replace(whole, checkpoint_dir=str(tmp_path / "again")), losses_of(run)


def test_a_training_that_ends_at_once_goes_on_from_its_last_checkpoint(run, monkeypatch, tmp_path):
    again, expected = trained_whole(run, tmp_path)
    monkeypatch.setattr(job, "SAVE_SECONDS", 0.0)
    steps = job.train

    def interrupted(state, batch_at, total, on_step):
        def stop(step, loss):
            on_step(step, loss)
            if step == 4:
                raise KeyboardInterrupt

        return steps(state, batch_at, total, stop)

    monkeypatch.setattr(job, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perplexity.main(again)
    seen = []
    monkeypatch.setattr(job, "train", lambda state, *rest: seen.append(state.step) or steps(state, *rest))
    perplexity.main(again)
    assert seen == [4]
    assert losses_of(run) == expected


@pytest.mark.usefixtures("interrupts_arrive")
def test_an_interrupted_training_goes_on_where_it_stopped(run, monkeypatch, tmp_path):
    again, expected = trained_whole(run, tmp_path)
    started, steps = [], job.train

    def interrupted(after, number):
        """Training that receives a signal, as of Ctrl-C or of a scheduler that needs the machine, while a step is taken."""

        def train(state, batch_at, total, on_step):
            started.append(state.step)

            def batch(step):
                if step + 1 == after:
                    signal.raise_signal(number)
                return batch_at(step)

            return steps(state, batch, total, on_step)

        return train

    for after, number in ((2, signal.SIGINT), (5, signal.SIGTERM), (6, signal.SIGINT)):
        monkeypatch.setattr(job, "train", interrupted(after, number))
        with pytest.raises(KeyboardInterrupt):
            perplexity.main(again)
    perplexity.main(again)
    assert started == [0, 2, 5]  # the signal in the last step came when all was trained
    assert losses_of(run) == expected


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
    statistics = job.token_statistics
    monkeypatch.setattr(job, "token_statistics", lambda ids, **sizes: seen.append(len(ids)) or statistics(ids, **sizes))
    perplexity.main(replace(run, test_htt_ranks=(2,), train_tokens=16 * 32 * 2, baseline=False))
    assert seen == [2 * 16 * 33]  # windows of 32 and their last targets


@pytest.mark.parametrize("value", ["baseline", "x=y", "phase1_htt16=z"])
def test_a_wrong_checkpoint_argument_is_named(run, value):
    with pytest.raises(ValueError, match="must be a folder, or NAME=PATH"):
        perplexity.main(replace(run, checkpoint=(value,)))


def settings_of(run, **changes):
    names = TrainRun.__dataclass_fields__.keys() - {"model"}  # of which a comparison has several
    shared = {name: getattr(run, name) for name in names if hasattr(run, name)}
    return TrainRun(**(shared | {"htt_rank": 2, "ar_ssm_max_rank": 4, "train_tokens": 4096} | changes))


def test_train_writes_a_checkpoint_and_prints_the_command_that_evaluates_it(run, capsys, tmp_path):
    assert train.main(settings_of(run, out_dir=str(tmp_path / "mine"))) == 0
    out = capsys.readouterr().out
    assert "trained on 4,096 tokens" in out
    command = shlex.split(out.split("next  phase1 perplexity ")[1].split("   its perplexity")[0])
    evaluation = parse("perplexity", [*command, "--out-dir", run.out_dir])
    assert perplexity.main(evaluation) == 0  # one model: nothing to compare, nothing to judge
    result = read_report(f"{run.out_dir}/{FILE}", "perplexity").results["phase1_htt2_ar4"]
    assert result.trained_tokens == 4096 and result.training["train_tokens"] == 4096


def test_steps_whose_gradients_overflow_are_counted_where_the_trained_tokens_are(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26))
    settings = settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=40 * 512, precision="fp16")
    assert train.main(settings) == 0
    out = capsys.readouterr().out
    index = json.loads((tmp_path / "mine" / INDEX).read_text())
    skipped = 26 - int(math.log2(index["scaler"]["scale"]))  # every overflow halves the scale
    assert 0 < skipped < 40 and index["facts"]["skipped_steps"] == skipped and index["facts"]["trained_tokens"] == 40 * 512
    assert f"of these steps {skipped} changed nothing: their gradients overflowed" in out
    perplexity.main(parse("perplexity", [*shlex.split(out.split("next  phase1 perplexity ")[1].split("   its perplexity")[0]), "--out-dir", run.out_dir]))
    assert read_report(f"{run.out_dir}/{FILE}", "perplexity").results["phase1_htt2_ar4"].skipped_steps == skipped


def test_a_training_without_overflow_speaks_of_no_skipped_step(run, capsys, tmp_path):
    train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512))
    assert "changed nothing" not in capsys.readouterr().out
    assert json.loads((tmp_path / "mine" / INDEX).read_text())["facts"]["skipped_steps"] == 0


def test_a_finished_checkpoint_of_other_settings_is_not_taken_for_this_one(run, tmp_path):
    train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512))
    with pytest.raises(ValueError, match=r"made with other --seed \(\d+, not \d+\); use those"):
        train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512, seed=3))


def test_a_finished_checkpoint_with_the_tensors_of_an_earlier_version_is_not_taken_for_this_one(run, tmp_path):
    mine = tmp_path / "mine"
    train.main(settings_of(run, out_dir=str(mine), train_tokens=512))
    (file,) = mine.glob("model-*.safetensors")
    tensors = load_file(file)
    save_file({("embedding.band.basis" if "coordinates.0" in name else name): t for name, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"does not fit this version: embedding\.band\.coordinates\.0 must be .*; train again"):
        train.main(settings_of(run, out_dir=str(mine), train_tokens=512))


def test_a_variant_can_be_trained_alone_and_evaluated_under_its_name(run, tmp_path, capsys):
    train.main(settings_of(run, out_dir=str(tmp_path / "mine"), train_tokens=512, embedding="dense"))
    assert f"--checkpoint ar_ssm_dense={tmp_path / 'mine'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model there is ar_ssm_dense; use that name"):
        perplexity.main(replace(run, checkpoint=(f"baseline={tmp_path / 'mine'}",)))


def test_variants_and_repetitions_are_trained_and_compared_with_the_baseline_of_their_seed(run):
    variants = ("ar_ssm_dense", "attention_htt", "no_gate", "no_copy", "transformer_copy", "equal_parameters")
    short = replace(run, variants=variants, repeats=2, test_htt_ranks=(2,), train_tokens=16 * 32 * 25)
    assert perplexity.main(short) in (0, 1)
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    plain = ["baseline", "phase1_htt2_ar4", *variants]
    assert list(report.results) == plain + [f"{key}_seed1" for key in plain]
    assert [r.training["seed"] for r in report.results.values()] == [0] * 8 + [1] * 8
    first, again = report.results["phase1_htt2_ar4"], report.results["phase1_htt2_ar4_seed1"]
    assert first.perplexity != again.perplexity and first.config_id == again.config_id
    expected = again.perplexity / report.results["baseline_seed1"].perplexity
    assert again.ppl_degradation_percent == pytest.approx(100 * (expected - 1), abs=1e-6)
    names = {check.name for check in report.checks}
    assert {
        "ar_ssm_dense_within_3_percent", "equal_parameters_seed1_within_0_percent", "gate_costs_at_most_1_percent",
        "effective_rank_at_most_half_seed1", "gate_costs_mean_of_seeds_within_1_percent", "phase1_htt2_ar4_mean_of_seeds_within_5_percent",
    } <= names and not {"no_gate_within_5_percent", "no_copy_within_5_percent", "transformer_copy_within_5_percent"} & names  # fmt: skip


def test_a_model_that_diverges_is_recorded_and_the_others_go_on(run):
    """Rates at which the engine has no chance."""
    assert perplexity.main(replace(run, learning_rate=1e6, test_htt_ranks=(2,), train_tokens=16 * 32 * 20)) == 3
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    engine = report.results["phase1_htt2_ar4"]
    assert engine.status == "error" and "lower --learning-rate" in engine.detail and engine.perplexity is None
    assert report.results["baseline"].perplexity and "the loss is" in report.checks[0].detail


def test_a_model_that_runs_out_of_memory_is_recorded_and_the_others_go_on(run, monkeypatch):
    evaluate = one_case.evaluate_checkpoint

    def full(run, model, *rest):
        if model.key == "baseline":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return evaluate(run, model, *rest)

    monkeypatch.setattr(one_case, "evaluate_checkpoint", full)
    assert perplexity.main(replace(run, test_htt_ranks=(2,))) == 3
    report = read_report(f"{run.out_dir}/{FILE}", "perplexity")
    assert report.results["baseline"].status == "oom" and "try --micro-batch-size 8" in report.results["baseline"].detail
    assert report.results["phase1_htt2_ar4"].perplexity and "out of memory" in report.checks[0].detail


def test_out_of_memory_in_training_ends_with_sizes_to_try(run, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(job, "train", full)
    with pytest.raises(Unavailable, match="try --micro-batch-size 8"):
        train.main(settings_of(run, out_dir=str(tmp_path / "mine")))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run with its baseline and its engine already trained at T = 16: the settings that evaluate them, nothing else."""
    path = tmp_path_factory.mktemp("trained")
    run = PerplexityRun(
        dataset_name=str(folder), tokenizer="bpe", cache_dir=str(path / "cache"), out_dir=str(path / "out"),
        checkpoint_dir=str(path / "checkpoints"), vocab_size=300, d_model=16, n_layers=1, n_heads=2, ar_ssm_min_rank=2,
        ar_ssm_window=4, htt_dense_rows=20, htt_groups=10, test_htt_ranks=(2,), test_ar_ssm_ranks=(4,), seq_length=16,
        train_tokens=16 * 16 * 40, train_batch_size=16, micro_batch_size=16, learning_rate=1e-2,
        baseline_learning_rate=1e-2, verbose=True,
    )  # fmt: skip
    perplexity.main(run)
    folders = {name: next(Path(run.checkpoint_dir).glob(f"{name}-*")) for name in ("baseline", "phase1_htt2_ar4")}
    return replace(run, checkpoint=tuple(f"{name}={path}" for name, path in folders.items()))


def evaluated(run, tmp_path):
    """Exit status and report of an evaluation that writes into `tmp_path`."""
    status = perplexity.main(replace(run, out_dir=str(tmp_path)))
    return status, read_report(tmp_path / FILE, "perplexity")


@pytest.fixture
def other(folder, tmp_path):
    """A text with the tokenizer of `folder`, and half its validation text."""
    path = tmp_path / "other.text"
    shutil.copytree(folder, path)
    lines = (path / "valid.txt").read_text().splitlines(keepends=True)
    (path / "valid.txt").write_text("".join(lines[:30]))
    return path


def test_a_further_text_has_a_report_of_its_own_like_a_run_on_it_alone(trained, other, tmp_path, capsys):
    status, first = evaluated(replace(trained, also_evaluate=(str(other),)), tmp_path / "both")
    assert capsys.readouterr().out.count("phase1_perplexity_losses.png, phase1_perplexity_comparison.png") == 2  # each a report and two plots
    _, alone = evaluated(trained, tmp_path / "first")
    other_status, other_alone = evaluated(replace(trained, dataset_name=str(other)), tmp_path / "second")
    beside = read_report(tmp_path / "both" / "other_text" / FILE, "perplexity")
    assert first.results == alone.results and beside.results == other_alone.results
    assert beside.results["baseline"].token_count < first.results["baseline"].token_count
    assert status == max(other_status, status) and beside.checks == other_alone.checks


def test_further_texts_of_other_tokens_or_of_one_name_are_refused_before_training(run, other, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "measure", lambda *args: pytest.fail("measured"))
    (tmp_path / "b").mkdir()
    shutil.copytree(other, tmp_path / "b" / other.name)
    with pytest.raises(ValueError, match="different names; got other_text other_text"):
        perplexity.main(replace(run, also_evaluate=(str(other), str(tmp_path / "b" / other.name))))
    (other / "train.txt").write_text("another language entirely . " * 200)
    with pytest.raises(ValueError, match="has another tokenizer"):
        perplexity.main(replace(run, also_evaluate=(str(other),)))


def test_a_further_text_cannot_leave_the_output_folder(run):
    assert perplexity.folders_of(run, ["a", "../../b", "owner/name", ".."])[1:] == [
        Path(run.out_dir) / name for name in ("______b", "owner_name", "__")
    ]


def test_losses_by_context_and_frequency_add_up_to_the_loss_of_every_model(trained, tmp_path, capsys):
    _, report = evaluated(trained, tmp_path)
    for result in report.results.values():
        assert [(p.first, p.last) for p in result.loss_by_position] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
        assert [(p.first, p.last) for p in result.loss_by_band] == [(0, 299)]
        for parts in (result.loss_by_position, result.loss_by_band):
            assert sum(p.tokens for p in parts) == result.token_count
            assert math.fsum(p.tokens * p.avg_loss for p in parts) == pytest.approx(math.fsum(result.window_nll_nats), rel=1e-9)
    assert len({r.token_order_sha256 for r in report.results.values()}) == 1
    assert "tokens of context" in capsys.readouterr().out
    assert (tmp_path / "phase1_perplexity_losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_brings_the_order_of_the_tokens_it_was_trained_on(trained):
    corpus = load_corpus(trained, vocab_size=300, need=("train",))
    for item in trained.checkpoint:
        order = load_token_order(item.partition("=")[2]).numpy()
        seen = job.Windows(corpus.splits["train"].ids, 16, 0).seen(16 * 40)
        counts = np.bincount(seen, minlength=300)
        assert len(seen) < len(corpus.splits["train"].ids)
        assert sorted(order) == list(range(300)) and (np.diff(counts[order]) <= 0).all()


def test_every_target_is_scored_once_whatever_the_stride_and_more_context_is_another_protocol(trained, tmp_path):
    reports = [evaluated(replace(trained, stride=stride), tmp_path / str(stride))[1] for stride in (None, 16, 5)]
    baselines = [report.results["baseline"] for report in reports]
    assert len({r.token_count for r in baselines}) == 1 and {r.tokens for r in baselines[2].loss_by_position[:1]} == {1}
    assert baselines[0].protocol_hash == baselines[1].protocol_hash != baselines[2].protocol_hash
    assert baselines[0].window_nll_nats == baselines[1].window_nll_nats
    assert set(baselines[2].window_tokens[1:-1]) == {5} and baselines[2].window_tokens[0] == 16


def test_models_are_scored_at_eight_times_the_length_of_their_training_without_a_verdict(trained, tmp_path, capsys):
    status, report = evaluated(replace(trained, seq_length=128, stride=32), tmp_path)
    assert status == 3 and "scored at T = 128, trained at T = 16" in report.checks[0].detail
    for result in report.results.values():
        assert result.trained_seq_length == 16 and result.passes_5_percent_threshold is None
        assert (result.loss_by_position[-1].first, result.loss_by_position[-1].last) == (64, 127)
    assert report.results["phase1_htt2_ar4"].ppl_degradation_percent is not None
    assert "Windows: T = 128, stride 32; in training T = 16." in capsys.readouterr().out


def test_two_lengths_of_context_are_compared_on_the_same_targets(trained, tmp_path):
    """The recipe of the guide: equal strides, so that windows past the longer first one score the same targets."""
    S, short, long = 16, 32, 128
    reports = [evaluated(replace(trained, seq_length=T, stride=S), tmp_path / str(T))[1] for T in (short, long)]
    less, more = (report.results["phase1_htt2_ar4"] for report in reports)
    skip = 1 + (long - short) // S
    assert less.window_tokens[skip:] == more.window_tokens[1:]
    assert sum(less.window_tokens[:skip]) == more.window_tokens[0] == long
    percent, (low, high) = paired_ratio_interval(more.window_nll_nats[1:], less.window_nll_nats[skip:], more.window_tokens[1:])
    assert low < percent < high and abs(percent) < 50


def copied(run, tmp_path, name, change):
    """`run` with a copy of checkpoint `name` to which `change(folder, index)` was done."""
    found = dict(item.split("=", 1) for item in run.checkpoint)
    folder = tmp_path / name
    shutil.copytree(found[name], folder)
    index = json.loads((folder / INDEX).read_text())
    change(folder, index)
    (folder / INDEX).write_text(json.dumps(index))
    return replace(run, checkpoint=tuple(f"{key}={path}" for key, path in (found | {name: str(folder)}).items()))


def test_a_checkpoint_of_an_earlier_version_has_no_bands_and_says_why(trained, tmp_path):
    old = copied(trained, tmp_path, "baseline", lambda folder, index: index["files"].pop("tokens"))
    _, report = evaluated(old, tmp_path)
    result = report.results["baseline"]
    assert result.loss_by_band is None and result.token_order_sha256 is None and "train again" in result.loss_by_band_detail
    assert result.loss_by_position and report.results["phase1_htt2_ar4"].loss_by_band


@pytest.mark.parametrize("order", [torch.arange(299), torch.arange(300) // 2, torch.zeros(300, dtype=torch.int32)], ids=str)
def test_a_token_order_that_is_none_is_refused_in_one_line(trained, tmp_path, order):
    bad = copied(trained, tmp_path, "baseline", lambda at, index: save_file({"order": order}, at / index["files"]["tokens"]))
    with pytest.raises(ValueError, match="the token order must hold 0 to 299 once each; train again") as caught:
        perplexity.main(replace(bad, out_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_bands_of_other_ranks_are_not_put_side_by_side(trained, tmp_path, capsys):
    other = torch.arange(300, dtype=torch.int32).flip(0)
    mixed = copied(
        trained, tmp_path, "phase1_htt2_ar4", lambda at, index: save_file({"order": other}, at / index["files"]["tokens"])
    )
    _, report = evaluated(mixed, tmp_path)
    assert len({r.token_order_sha256 for r in report.results.values()}) == 2
    out = capsys.readouterr().out
    assert "phase1_htt2_ar4: no losses by rank, trained on other tokens, so its ranks are others" in " ".join(out.split())


def test_models_trained_at_different_lengths_are_not_compared(trained, tmp_path):
    def twice_as_long(folder, index):
        index["facts"]["seq_length"] *= 2
        index["train_config"]["train_batch_size"] //= 2  # as many tokens in as many steps

    longer = copied(trained, tmp_path, "baseline", twice_as_long)
    status, report = evaluated(longer, tmp_path)
    assert status == 3 and "trained_seq_length differ: 16 and 32" in report.checks[0].detail
    assert report.results["phase1_htt2_ar4"].ppl_degradation_percent is None


@pytest.mark.parametrize("stride", [0, 513])
def test_a_stride_that_leaves_targets_out_is_refused(stride):
    with pytest.raises(ValueError, match="--stride must be"):
        PerplexityRun(stride=stride)


def test_a_training_that_diverges_before_a_checkpoint_is_due_saves_nothing_and_is_the_error_of_its_model(run, monkeypatch):
    monkeypatch.setattr(job, "SAVE_SECONDS", 0.0)
    diverging = replace(run, learning_rate=1e14, test_htt_ranks=(2,), train_tokens=16 * 32 * 6, baseline_learning_rate=1e-3)
    assert perplexity.main(diverging) == 3
    results = read_report(f"{run.out_dir}/{FILE}", "perplexity").results
    assert results["baseline"].status == "ok"
    assert results["phase1_htt2_ar4"].status == "error" and "lower --learning-rate" in results["phase1_htt2_ar4"].detail
    saved = [path for path in Path(run.checkpoint_dir).rglob("*.safetensors") if "phase1" in path.parent.name]
    assert all(torch.isfinite(tensor).all() for path in saved for tensor in load_file(path).values())


def test_an_interrupt_of_a_diverged_training_ends_with_the_divergence(run, monkeypatch):
    config = settings_of(run, learning_rate=1e14, train_tokens=16 * 32 * 50)
    monkeypatch.setattr(job, "interrupts_wait", lambda: nullcontext(lambda: True))
    with pytest.raises(Diverged, match="lower --learning-rate"):
        for _ in range(3):  # the first step may still have a finite loss, and its checkpoint is refused for its weights
            with suppress(KeyboardInterrupt):
                train.main(config)


def test_words_are_counted_document_by_document(run, tmp_path):
    """As tokens with end-of-text between documents, as text, and against the documents themselves."""
    rng = random.Random(2)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls"]
    documents = [" ".join(rng.choices(words, k=rng.randint(8, 14))) + "." for _ in range(50)] + ["", "東京 は\n大きい", "\n"]
    tokenizer = gpt2_tokenizer()
    ids = np.array([i for text in documents for i in (*tokenizer.encode(text), tokenizer.end_of_text)])
    expected = sum(len(text.split()) + text.count("\n") for text in documents)
    assert one_case.word_count(tokenizer, ids) == expected == one_case.word_count(tokenizer, ids[:-1])
    evaluation = Evaluation(np.ones(len(ids)), np.zeros(len(ids), int), np.array([len(ids)]), None)
    fields = one_case.per_byte_and_word(evaluation, tokenizer, ids)
    assert fields["byte_count"] == sum(len(text.encode()) for text in documents) and fields["absent"] == {}
    assert fields["word_perplexity"] == pytest.approx(math.exp(len(ids) / expected))


@pytest.mark.parametrize(
    "text, missing",
    [
        ("", {"bits_per_byte", "word_perplexity"}), ("   ", {"word_perplexity"}), ("朝の市場で魚を買った。" * 20, {"word_perplexity"}),
        ("ACGT" * 200, {"word_perplexity"}), ("a few words", set()), ("朝の市場で 魚を買った。", set()), ("\n", set()),
    ],
    ids=["nothing", "blanks", "japanese", "letters", "english", "spaces", "newline"],
)  # fmt: skip
def test_a_number_that_a_text_does_not_have_is_absent_with_its_reason(text, missing):
    tokenizer = gpt2_tokenizer()
    ids = np.array([*tokenizer.encode(text), tokenizer.end_of_text])
    fields = one_case.per_byte_and_word(Evaluation(np.ones(len(ids)), ids, np.array([len(ids)]), None), tokenizer, ids)
    assert fields["absent"].keys() == missing == {name for name in ("bits_per_byte", "word_perplexity") if fields[name] is None}
    assert all(fields["absent"].values())


def test_losses_past_the_end_of_float64_give_no_number(run):
    tokenizer = gpt2_tokenizer()
    ids = np.array(tokenizer.encode("a few words"))
    evaluation = Evaluation(np.full(len(ids), 701.0), ids, np.array([len(ids)]), None)
    fields = one_case.per_byte_and_word(evaluation, tokenizer, ids)
    assert fields["word_perplexity"] is None and "float64" in fields["absent"]["word_perplexity"]


def test_a_text_of_blanks_is_scored_and_its_report_says_what_it_lacks(run, capsys, tmp_path, recwarn):
    shutil.copytree(run.dataset_name, tmp_path / "blank")
    (tmp_path / "blank" / "valid.txt").write_text("   ")
    blank = replace(run, dataset_name=str(tmp_path / "blank"), test_htt_ranks=(2,), train_tokens=2048)
    assert perplexity.main(blank) == 3
    results = read_report(f"{run.out_dir}/{FILE}", "perplexity").results
    assert all(r.word_perplexity is None and r.word_count == 0 and r.bits_per_byte > 0 for r in results.values())
    assert "No word perplexity: the scored text has 0 words" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "divide" in str(warning.message)]


def test_micro_batches_are_no_part_of_what_a_trained_model_is_found_by(run, monkeypatch):
    short = replace(run, test_htt_ranks=(2,), train_tokens=2048, baseline=False)
    perplexity.main(short)
    monkeypatch.setattr(job, "make_state", lambda *arguments: pytest.fail("trained again"))
    perplexity.main(replace(short, micro_batch_size=4))


def test_a_folder_that_cannot_be_written_is_found_before_the_text_is_read(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train, "load_corpus", lambda *arguments, **needs: pytest.fail("read"))
    with pytest.raises(OSError):
        train.main(settings_of(run, out_dir=str(tmp_path / "file")))
