import errno
import json
import math
import os
import re
import tomllib
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from phase1.cli import main, parse
from phase1.commands import train
from phase1.config import to_toml
from phase1.files import alone_in, naming
from phase1.records.metrics import METRICS, read_metrics, rows_of_last_text
from phase1.records.schema import FILES, read_report
from phase1.tables.perplexity import perplexity_comparison
from phase1.training import job
from phase1.training.checkpoint import INDEX, read_index
from phase1.training.progress import Follower
from phase1.training.step import precision, total_steps
from phase1.training.watch import Watch
from tests.reports import contents

SHAPE = [
    "--vocab-size", "300", "--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--ar-ssm-min-rank", "2", "--ar-ssm-window", "4",
    "--htt-dense-rows", "4", "--htt-groups", "10", "--seq-length", "8", "--train-tokens", "640", "--train-batch-size", "4", "--micro-batch-size", "4",
]  # fmt: skip
MODEL = ["--ar-ssm-max-rank", "4", "--htt-rank", "2"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train.txt").write_text("the cat sees the dog . a dog sees the cat .\n" * 40)
    (tmp_path / "valid.txt").write_text("the dog sees a cat .\n" * 40)
    return ["--dataset-name", str(tmp_path), "--tokenizer", "bpe", "--cache-dir", str(tmp_path / "cache")]


@pytest.fixture
def run(data, tmp_path, capfd):
    def run(name, *flags, code=0):
        assert main(["train", *SHAPE, *MODEL, *data, "--out-dir", str(tmp_path / name), *flags]) == code
        return capfd.readouterr()

    return run


def weights(folder):
    (path,) = folder.glob("model-*")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def test_watching_changes_no_bit_of_the_training(run, tmp_path):
    run("plain", "--eval-every", "0")
    run("watched", "--eval-every", "1", "--sample-every", "1", "--prompt", "the")
    assert weights(tmp_path / "plain") == weights(tmp_path / "watched")
    facts = [read_index(tmp_path / name)["facts"] for name in ("plain", "watched")]
    assert facts[0]["loss"] == facts[1]["loss"]
    assert (tmp_path / "watched" / "samples.txt").read_text().startswith("== step 1\nthe")


def test_the_last_validation_loss_is_that_of_perplexity_on_the_same_windows(run, data, tmp_path):
    run("a", "--eval-every", "7", "--eval-tokens", "40")
    rows = read_metrics(tmp_path / "a" / METRICS)
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [7, 14, 20]
    evaluation = [
        "perplexity",
        *SHAPE,
        *data,
        "--max-samples",
        "5",
        "--test-htt-ranks",
        "2",
        "--test-ar-ssm-ranks",
        "4",
        "--checkpoint",
        f"phase1_htt2_ar4={tmp_path / 'a'}",
    ]
    main([*evaluation, "--out-dir", str(tmp_path / "out")])
    (result,) = json.loads((tmp_path / "out" / "phase1_perplexity_validation.json").read_text())["results"].values()
    assert rows[-1]["val_loss"] == pytest.approx(result["avg_loss"], rel=1e-6) and result["token_count"] == 40


@pytest.mark.parametrize(
    "flags", [[], ["--train-tokens", "100000000"], ["--train-tokens", "123456789", "--seq-length", "2048"]]
)
def test_a_long_run_has_about_20_scores_that_take_less_than_2_percent_of_it(flags):
    plan = parse("train", flags)
    steps = total_steps(plan, plan.seq_length)
    watch = Watch(score=lambda model: 0.0, score_every=train._every(plan))
    follower = Follower(None, steps, 0, None, watch)
    scores = sum(follower._score_due(step) for step in range(1, steps + 1))
    endless = SimpleNamespace(splits={"valid": SimpleNamespace(ids=range(10**12))})
    scored = scores * train._windows(plan, endless) * plan.seq_length
    forward = 1 / 3  # of a step's work
    assert 20 <= scores <= 22 and 0.005 < forward * scored / plan.train_tokens < 0.02


def test_the_first_lines_say_what_will_happen(run):
    out, err = run("a")
    first, second = err.splitlines()[:2]
    assert first.startswith("phase1_htt2_ar4: 6,") or "parameters; 20 steps of 32 tokens = 640 tokens" in first
    assert "epochs of" in first and "FLOPs" in first
    assert second == "loss on 281 tokens of the valid split every 1 steps"  # all there are, the last window is short
    lines = out.splitlines()
    assert len(lines) <= 25 and lines[0].startswith("Training of phase1_htt2_ar4 on ") and "trained on 640 tokens" in lines
    assert [line.split()[2] for line in lines if line.startswith("next")] == ["generate", "perplexity", "report"]
    assert any("training.png" in line and line.startswith("files") for line in lines) and any("valid text" in line for line in lines)


def test_the_last_screen_has_the_mean_loss_of_the_last_steps(run, tmp_path):
    out = run("a").out
    rows = read_metrics(tmp_path / "a" / METRICS)
    last, mean = rows[-1]["loss"], sum(row["loss"] for row in rows[-10:]) / 10
    assert f"loss {last:.3f} in the last step, mean of the last 10 steps {mean:.3f}\n" in out and f"{last:.3f}" != f"{mean:.3f}"


@pytest.mark.parametrize(
    "rows, says",
    [
        ([(1, 5.0), (2, 4.0), (4, 2.5)], ", mean of the last 4 steps 3.500"),
        ([(100 * i, float(i)) for i in range(1, 13)] + [(3000, 3.0)], ", mean of the last 2,700 steps 4.667"),
        ([(1, 5.0), (2, None)], ""),
        ([], ""),
    ],
)
def test_rows_count_by_their_steps_in_the_mean_loss(rows, says):
    assert train._mean_of_last([{"step": step, "loss": loss} for step, loss in rows]) == says


def test_a_run_pauses_when_its_hours_are_over_and_goes_on_with_more(run, tmp_path):
    run("whole")
    out = run("a", "--max-hours", "1e-9").out
    assert "\npaused after 32 tokens" in out and "more of them goes on" in out
    assert not read_index(tmp_path / "a")["facts"]["finished"]
    before = contents(tmp_path / "a")
    assert run("a", "--max-hours", "1e-9").out == out and contents(tmp_path / "a") == before
    err = run("a", "--max-hours", "100").err
    assert "\nphase1_htt2_ar4: resuming at step 1 of 20\n" in err and "\nphase1_htt2_ar4: step 20/20 100 %" in err
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")  # the schedule is that of the whole run
    assert [row["step"] for row in read_metrics(tmp_path / "a" / METRICS)] == list(range(1, 21))


class FullAt:
    """A file of lines whose disk is full at one of them, of which half is written, as `write` does it."""

    def __init__(self, path, number):
        self.file, self.left = path.open("ab"), number

    def write(self, data):
        self.left -= 1
        self.file.write(data if self.left else data[: len(data) // 2])
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()
        if self.left < 1:  # Python tries the rest again
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", [3, 20])
def test_a_full_disk_ends_a_training_with_a_checkpoint_of_its_steps(run, tmp_path, monkeypatch, at):
    """In the middle and at the last step; the same command goes on from there."""
    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr("phase1.records.metrics.open_to_append", lambda path: FullAt(path, at))
        said, error = run("a", code=4).err.splitlines()[-2:]
    full = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: '{tmp_path / 'a' / METRICS}'"
    assert error == f"phase1 train: error: {full}; remove what is not needed from the disk of that path, then run the command again"
    assert said == f"phase1_htt2_ar4: a file could not be written; the checkpoint has step {at}"
    assert read_index(tmp_path / "a")["step"] == at and read_index(tmp_path / "a")["facts"]["finished"] == (at == 20)
    run("a")
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")


def test_a_disk_without_room_for_the_checkpoint_either_names_a_file_all_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr("phase1.records.metrics.open_to_append", lambda path: FullAt(path, 1))

    def full(path, data):
        with naming(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("phase1.training.checkpoint.atomic_write", full)
    error = run("a", code=4).err.splitlines()[-1]
    assert f"'{tmp_path / 'a' / 'model-00000001.safetensors'}'; remove what" in error and not (tmp_path / "a" / INDEX).exists()


def test_data_without_a_valid_split_train_without_its_loss_unless_it_is_asked_for(run, tmp_path):
    (tmp_path / "valid.txt").unlink()
    err = run("a").err
    assert "no loss on a valid split during the training: " in err
    assert all(row["val_loss"] is None for row in read_metrics(tmp_path / "a" / METRICS))
    assert "must have a valid split" in run("b", "--eval-every", "5", code=2).err


@pytest.mark.parametrize("flags", [[], ["--eval-every", "0"]])
def test_without_a_valid_split_the_next_command_says_what_it_needs(run, tmp_path, flags):
    (tmp_path / "valid.txt").unlink()
    (line,) = (line for line in run("a", *flags).out.splitlines() if "phase1 perplexity" in line)
    says = f"put a valid.txt into {tmp_path}, then: phase1 perplexity "
    assert says in line
    (tmp_path / "valid.txt").write_text("the dog sees a cat .\n" * 40)
    assert says not in run("a", *flags).out


@pytest.mark.parametrize("words, says, short", [("the", "loss on 2 tokens of the valid split", True), ("the dog sees . " * 2000, None, False)])
def test_a_valid_text_too_short_to_judge_by_is_said_to_be_that(run, scored, tmp_path, words, says, short):
    """Tokens are counted that are scored, not those of whole windows; the advice to train on is for texts that can show it."""
    scored(*[9] * 20)
    (tmp_path / "valid.txt").write_text(words)
    out, err = run("a")
    assert says is None or says in err
    assert ("the valid text is too short to judge by: 2 tokens" in out) == short
    assert ("it has not beaten them: more --train-tokens" in out) != short


def test_an_interrupted_run_has_its_settings_and_its_plot(run, data, monkeypatch, tmp_path):
    """Settings before the first step, the plot of the steps so far; a run that is refused leaves those of the other."""

    def at_first(self, step, loss):
        assert (tmp_path / "a" / "run.toml").is_file()
        after_step(self, step, loss)
        if step == 3:
            raise KeyboardInterrupt

    after_step = job.Schedule.after_step
    with monkeypatch.context() as patch:
        patch.setattr(job.Schedule, "after_step", at_first)
        run("a", code=130)
    assert (tmp_path / "a" / "training.png").stat().st_size > 1000
    settings = (tmp_path / "a" / "run.toml").read_text()
    asked = [*SHAPE, *MODEL, *data, "--out-dir", str(tmp_path / "a")]
    assert settings == to_toml(parse("train", asked)) and len(read_metrics(tmp_path / "a" / METRICS)) == 3
    monkeypatch.setattr(job, "limit_reached", lambda *_: None)
    run("a", "--max-hours", "1e-9")
    paused = (tmp_path / "a" / "run.toml").read_text()
    run("a", "--learning-rate", "1e-5", code=2)
    assert (tmp_path / "a" / "run.toml").read_text() == paused != settings


def test_the_file_of_a_run_is_in_its_folder_and_gives_it_again(run, data, tmp_path):
    run("a", "--prompt", 'say "no"\n\x7f', "--max-hours", "5")
    path = str(tmp_path / "a" / "run.toml")
    asked = parse(
        "train", [*SHAPE, *MODEL, *data, "--out-dir", str(tmp_path / "a"), "--prompt", 'say "no"\n\x7f', "--max-hours", "5"]
    )
    assert parse("train", ["--config", path]) == asked and to_toml(asked) == (tmp_path / "a" / "run.toml").read_text()


def test_a_text_from_a_model_that_diverged_is_no_error(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train.Decoder, "prefill", lambda *_: (_ for _ in ()).throw(ValueError("got NaN")))
    run("a", "--sample-every", "20")
    assert "(got NaN)" in (tmp_path / "a" / "samples.txt").read_text()


@pytest.mark.parametrize("asked, device, says", [("auto", "cpu", "fp32 on the CPU"), ("bf16", "cpu", "bf16, as asked")])
def test_the_precision_says_why(asked, device, says):
    assert precision(asked, device) == says


@pytest.mark.parametrize("flags, long", [([], True), (["--preset", "smoke"], False)])
def test_a_run_that_takes_days_on_a_cpu_says_so_before_it_begins(data, monkeypatch, flags, long):
    run = parse("train", [*flags, *data])
    monkeypatch.setattr(train, "device_type", lambda: "cpu")
    corpus = SimpleNamespace(name="text", splits={"train": SimpleNamespace(ids=range(10**6))})
    said = train.plan(run, train.part_of(train.ModelConfig, run), corpus, None)
    assert any("hours or days on a CPU; --preset smoke" in line for line in said) == long


@pytest.mark.parametrize("gigabytes, says", [(1, "it does not fit: try --micro-batch-size 4"), (1000, None), (None, None)])
def test_a_run_that_cannot_fit_says_so_before_it_begins(data, monkeypatch, gigabytes, says):
    run = parse("train", [*data, "--train-tokens", "1000", "--vocab-size", "300", "--htt-dense-rows", "4", "--htt-groups", "10"])
    monkeypatch.setattr(train, "device_type", lambda: "cuda")
    monkeypatch.setattr(train, "total_gpu_bytes", lambda: gigabytes and gigabytes * 10**9)
    monkeypatch.setattr(train, "precision", lambda *_: "fp16")
    corpus, _ = train._texts(run)
    line = train.plan(run, train.part_of(train.ModelConfig, run), corpus, None)[-1]
    assert line.startswith("memory: ") and " GB estimated" in line
    assert line.endswith(says) if says else "fit" not in line
    assert "NVIDIA" not in line
    monkeypatch.setattr(train, "amd_gpu", lambda: "a card")
    assert " GB estimated as on a card of NVIDIA, of " in train.plan(run, train.part_of(train.ModelConfig, run), corpus, None)[-1]


@pytest.mark.parametrize(
    "flags",
    [["--eval-every", "-1"], ["--sample-every", "-1"], ["--eval-tokens", "0"], ["--max-hours", "0"], ["--max-hours", "nan"]],
)
def test_bad_values_are_one_line(run, flags):
    assert run("a", *flags, code=2).err.count("\n") == 1


def test_without_limit_there_is_none():
    assert train.watch_of(parse("train", ["--eval-every", "0"]), None, None).max_seconds == math.inf


def test_memory_that_runs_out_is_one_line_with_what_to_lower(run, monkeypatch):
    monkeypatch.setattr(train, "train_to_checkpoint", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    err = run("a", code=3).err.splitlines()[-1]
    assert "try --micro-batch-size 2, then --piece-length 2" in err  # which does not change the result


@pytest.fixture
def scored(monkeypatch):
    """Runs whose scores are given, in turn; `made` counts them over all sessions."""
    made = []

    def scores(*values):
        monkeypatch.setattr(train, "scorer", lambda *_: lambda model: made.append(1) or float(values[len(made) - 1]))

    return scores


def test_the_weights_of_the_lowest_score_are_kept_beside_the_last(run, scored, monkeypatch, tmp_path):
    scored(5, 4, 6, 4, 7)
    out = run("a", "--eval-every", "4", "--keep-best").out
    best, last = read_index(tmp_path / "a" / "best"), read_index(tmp_path / "a")
    assert (best["step"], last["step"]) == (8, 20) and best["facts"]["trained_tokens"] == 8 * 32
    assert "best/" in out and "trained on 640 tokens" in out
    assert main(["generate", "--checkpoint", str(tmp_path / "a" / "best"), "--max-tokens", "2"]) == 0
    run("plain", "--eval-every", "0")
    assert weights(tmp_path / "plain") == weights(tmp_path / "a")
    monkeypatch.setattr(job, "limit_reached", lambda *_: None)  # a step a session
    for _ in range(8):
        run("short", "--eval-every", "0", "--max-hours", "1e-9")
    assert weights(tmp_path / "short") == weights(tmp_path / "a" / "best")


def test_patience_ends_a_training_that_gets_no_better_also_over_sessions(run, scored, monkeypatch, tmp_path):
    scored(5, 4, 6, 4, 7, 8)
    out = run("a", "--eval-every", "2", "--patience", "2").out
    assert "ended after 256 tokens: no lower loss on the valid text in 2 looks (--patience)" in out  # at step 8
    assert read_index(tmp_path / "a")["step"] == 8 and not read_index(tmp_path / "a")["facts"]["finished"]
    assert read_index(tmp_path / "a")["facts"]["ended_by"] == "patience"
    before = contents(tmp_path / "a")
    assert run("a", "--eval-every", "2", "--patience", "2").out == out and "; the same command with more of them goes on" in out
    assert contents(tmp_path / "a") == before
    run("a", "--eval-every", "2", "--patience", "4")
    assert read_index(tmp_path / "a")["step"] == 12  # scores 7 and 8: the fourth without a new lowest
    with monkeypatch.context() as patch:
        patch.setattr(job, "limit_reached", lambda *_: None)
        paused = run("a", "--eval-every", "0", "--max-hours", "1e-9").out  # it goes on, and pauses
    assert re.search(r"valid text +loss 8.000, best 4.000; \d\.\d+ is what token frequencies alone reach", paused)
    assert "ended_by" not in read_index(tmp_path / "a")["facts"]
    run("a", "--eval-every", "0")
    assert read_index(tmp_path / "a")["facts"]["finished"] and "ended_by" not in read_index(tmp_path / "a")["facts"]
    with_best = run("b", "--eval-every", "0", "--patience", "2", code=2).err
    assert "need losses on the valid split" in with_best and with_best.count("\n") == 1


def test_perplexity_and_reports_say_that_patience_has_ended_a_training(run, scored, data, tmp_path):
    """Of a training's own folder too; not of one that went on to its end, nor of a damaged checkpoint."""
    scored(5, 6, 7)
    run("a", "--eval-every", "2", "--patience", "2")
    ranks = ["--test-htt-ranks", "2", "--test-ar-ssm-ranks", "4"]
    folders = [*ranks, "--checkpoint", str(tmp_path / "a"), "--out-dir", str(tmp_path / "out")]
    note = "Training ended early, by --patience: phase1_htt2_ar4, after 192 of 640 tokens."

    def says():
        assert main(["perplexity", *SHAPE, *data, *folders]) in (0, 1, 3)
        texts = []
        for name in ("out", "a"):
            assert main(["report", "--results-dir", str(tmp_path / name)]) == 0
            texts.append((tmp_path / name / "report.html").read_text())
        report = read_report(tmp_path / "out" / FILES["perplexity"], "perplexity")
        (result,) = report.results.values()
        alone = "Ended early, by --patience: a."
        return result.ended_by, note in perplexity_comparison(report).notes, note in texts[0], alone in texts[1]

    assert says() == ("patience", True, True, True)
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    for damaged in (index | {"facts": [1]}, [1]):
        (tmp_path / "a" / INDEX).write_text(json.dumps(damaged))
        assert main(["report", "--results-dir", str(tmp_path / "a")]) == 2  # which names it
        assert "by --patience" not in (tmp_path / "a" / "report.html").read_text()
    index["facts"]["ended_by"] = "boredom"
    (tmp_path / "a" / INDEX).write_text(json.dumps(index))
    assert main(["perplexity", *SHAPE, *data, *folders]) == 2
    del index["facts"]["ended_by"]
    (tmp_path / "a" / INDEX).write_text(json.dumps(index))
    run("a", "--eval-every", "0")
    assert says() == (None, False, False, False)


def test_patience_without_a_valid_split_is_refused(run, tmp_path):
    (tmp_path / "valid.txt").unlink()
    assert "must have a valid split" in run("b", "--patience", "5", code=2).err


def test_a_training_that_is_refused_leaves_no_folder(run, tmp_path):
    run("a/b", "--seq-length", "999999", code=2)
    run("a/b", "--context-parallel", code=2)
    assert not (tmp_path / "a").exists()


def test_a_training_that_has_learnt_nothing_says_so_and_exits_3(run, tmp_path):
    out, err = run("a", "--learning-rate", "30", "--mixer", "attention", "--embedding", "dense", "--no-copy-head", code=3)
    loss = read_index(tmp_path / "a")["facts"]["loss"]
    assert loss > math.log(300) and "training.png" in out
    assert err.splitlines()[-1] == (
        f"phase1 train: the last loss, {loss:.3f}, is worse than guessing, which is ln V = {math.log(300):.3f}; "
        "lower --learning-rate, or train on more tokens"
    )


def test_an_interrupt_promises_a_checkpoint_only_if_there_is_one(run, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_to_checkpoint", interrupted)
        assert run("a", code=130).err.splitlines()[-1].endswith("; there is no checkpoint yet")
    run("a")
    monkeypatch.setattr(train, "train_to_checkpoint", interrupted)
    assert run("a", code=130).err.splitlines()[-1].endswith("; the same command goes on from its checkpoint")


def test_a_name_and_a_prompt_that_are_no_text_end_with_settings_that_say_so(run, tmp_path):
    name, prompt = tmp_path / os.fsdecode(b"\x83.txt"), os.fsdecode(b"the \x83")
    try:
        name.write_text("the cat sees the dog . a dog sees the cat .\n" * 40)
    except OSError:
        pytest.skip("this file system has names of UTF-8 only")
    run("a", "--dataset-name", str(name), "--sample-every", "20", "--prompt", prompt)
    written = (tmp_path / "a" / "run.toml").read_text()
    assert tomllib.loads(written)["prompt"] == "the \ufffd"
    for flag in ("dataset-name", "prompt"):
        (line,) = (line for line in written.splitlines() if line.startswith(f"{flag} = "))
        assert line.endswith(f"  # not UTF-8, so not as it was: give --{flag} itself")
    assert (tmp_path / "a" / "samples.txt").read_text().startswith("== step 20\nthe \ufffd")


def test_another_text_in_the_same_folder_is_told_by_name(run, tmp_path, capfd):
    run("a")
    (tmp_path / "other").mkdir()
    for name in ("train.txt", "valid.txt"):
        (tmp_path / "other" / name).write_text("a dog sees the cat .\n" * 300)
    flags = [*SHAPE, *MODEL, "--dataset-name", str(tmp_path / "other"), "--tokenizer", str(tmp_path / "a")]
    assert main(["train", *flags, "--out-dir", str(tmp_path / "a")]) == 2
    assert re.search(r"was trained on \S+ \([0-9a-f]{12}\); got other \([0-9a-f]{12}\); use that data, or", capfd.readouterr().err)


def test_a_line_that_is_damaged_ends_a_training_also_in_the_valid_split(data, tmp_path, capsys):
    path = tmp_path / "all.jsonl"
    path.write_text('{"text": "a dog sees the cat ."}\n' * 400 + "{\n")
    assert main(["train", *SHAPE, *MODEL, "--dataset-name", str(path), "--tokenizer", "bpe", "--out-dir", str(tmp_path / "b")]) == 2
    assert "line 401 of" in capsys.readouterr().err


def test_a_model_of_the_users_own_keeps_its_name(tmp_path):
    run = parse("train", ["--model", "gru=my_model:build"])
    assert (run.own_model, run.model, train.title(run, train.part_of(train.ModelConfig, run))) == ("gru", "my_model:build", "gru")
    assert parse("train", []).own_model is None


def test_a_training_into_the_folder_of_its_text_or_of_an_export_is_refused_and_leaves_it(run, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    err = run(".", code=2).err
    assert err.count("\n") == 1 and "--out-dir must be another folder than --dataset-name" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    err = run("export", code=2).err
    assert err.count("\n") == 1 and "--out-dir must hold no model for transformers" in err


@pytest.mark.parametrize("name", [INDEX, METRICS, "run.toml", "training.png", "samples.txt", "tokenizer.json", f"best/{INDEX}"])
def test_a_folder_in_the_place_of_a_file_is_told_before_the_text_is_read(run, tmp_path, monkeypatch, name):
    (tmp_path / "a" / name).mkdir(parents=True)
    monkeypatch.setattr(train, "_texts", lambda *_: pytest.fail("too late"))
    err = run("a", code=2).err
    says = f"--out-dir must have a file at {tmp_path / 'a' / name}, or nothing; got a folder; move it away, or give another --out-dir"
    assert err == f"phase1 train: error: {says}\n"


def test_a_damaged_checkpoint_is_told_before_the_text_is_read(run, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / INDEX).write_text("{")
    monkeypatch.setattr(train, "_texts", lambda *_: pytest.fail("too late"))
    assert "checkpoint.json is no strict JSON" in run("a", code=2).err


def test_a_folder_that_another_training_uses_is_refused(run, tmp_path):
    (tmp_path / "a").mkdir()
    with alone_in(tmp_path / "a"):
        assert "got one that is running; wait for its end" in run("a", code=2).err
    run("a")
    assert "got one that is running" not in run("a").err


def test_losses_on_another_valid_text_are_not_compared(run, data, tmp_path):
    run("a", "--eval-every", "1", "--max-hours", "1e-9", "--keep-best")
    first = read_metrics(tmp_path / "a" / METRICS)
    (tmp_path / "valid.txt").write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z\n" * 40)
    said = run("a", "--eval-every", "1", "--keep-best")
    rows = read_metrics(tmp_path / "a" / METRICS)
    assert "so far (1) are of another text" in said.err and rows_of_last_text(rows) == rows[len(first) :]
    best = min(row["val_loss"] for row in rows[len(first) :])
    assert f"best {best:.3f}" in said.out and read_index(tmp_path / "a" / "best")["step"] > first[-1]["step"]


def test_renamed_data_are_the_same_and_other_sizes_are_named_before_them(run, data, tmp_path):
    run("a", "--eval-every", "0")
    assert "other --vocab-size (300, not 290)" in run("a", "--eval-every", "0", "--vocab-size", "290", code=2).err
    facts = read_index(tmp_path / "a")["facts"]
    job.require_same_data(tmp_path, facts, facts["data"] | {"name": "moved"})
    with pytest.raises(ValueError, match="was trained on"):
        job.require_same_data(tmp_path, facts, facts["data"] | {"sha256": "0" * 64})


def test_settings_of_a_finished_training_stay_what_they_were(run, tmp_path):
    run("a")
    kept = (tmp_path / "a" / "run.toml").read_bytes()
    run("a", "--eval-tokens", "8")
    assert (tmp_path / "a" / "run.toml").read_bytes() == kept


@pytest.mark.parametrize("content", [b"my notes here now\n", b"one", b"\xff\xfe\n== step x\n", b""])
def test_a_file_of_ones_own_called_samples_stays(run, tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "samples.txt").write_bytes(content)
    run("a", "--sample-every", "16")
    assert (tmp_path / "a" / "samples.txt").read_bytes().startswith(content)


def test_a_reader_of_the_lines_who_goes_ends_no_training(run, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("phase1.training.progress.print", gone, raising=False)
    run("a")
    assert read_index(tmp_path / "a")["facts"]["finished"]


def test_what_token_frequencies_reach_is_of_the_tokens_that_are_scored(run, data, tmp_path):
    (tmp_path / "valid.txt").write_text("the the the the the the the the\n" * 9 + "a dog sees the cat .\n" * 90)
    run("few", "--eval-tokens", "8")
    run("all")
    few, every = (read_metrics(tmp_path / name / METRICS)[-1]["unigram_loss"] for name in ("few", "all"))
    assert few < every - 0.5
