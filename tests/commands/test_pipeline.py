import os
import re
from dataclasses import fields, replace

import pytest

from phase1.cli import main, parse
from phase1.commands import pipeline
from phase1.config import flag_of, flags
from phase1.errors import Unavailable
from phase1.presets import PRESETS
from phase1.runs import PipelineRun


class Step:
    """A command that records what it was given, and ends as told."""

    def __init__(self, ends):
        self.ends, self.runs = ends, {}

    def __call__(self, module):
        name = module.rsplit(".", 1)[1]
        step = type("step", (), {})
        step.main = lambda run: self.end(name, run)
        return step

    def end(self, name, run):
        self.runs[name] = run
        outcome = self.ends.get(name, 0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome() if callable(outcome) else outcome


@pytest.mark.parametrize(
    "ends, code",
    [
        ({}, 0),
        ({"memory": 1, "perplexity": 3}, 1),
        ({"memory": 3}, 3),
        ({"throughput": lambda: parse("memory", ["--batch-size", "0"])}, 2),
        ({"throughput": ValueError("of a library"), "memory": 1}, 5),
        ({"perplexity": Unavailable("no network")}, 3),
        ({"perplexity": OSError("disk full"), "memory": 3}, 4),
    ],
)
def test_every_step_runs_and_the_worst_decides(ends, code, monkeypatch, tmp_path):
    step = Step(ends)
    monkeypatch.setattr(pipeline.importlib, "import_module", step)
    assert pipeline.main(PipelineRun(preset="smoke", out_dir=str(tmp_path))) == code
    assert list(step.runs) == ["memory", "throughput", "perplexity", "tables", "report"]


@pytest.mark.parametrize(
    "preset, words, says",
    [
        ("smoke", ["--dataset-name", "nofile.txt"], "--dataset-name must be wikitext, .*; got nofile.txt; check the spelling"),
        ("smoke", ["--dataset-name", "readme.pdf"], "readme.pdf must be a text file .*; got another ending; rename it"),
        ("smoke", ["--tokenizer", "no/folder"], "--tokenizer must be auto, gpt2, bpe or a folder .*; got no/folder; use one"),
        ("smoke", ["--tokenizer", "data"], "--tokenizer data: a folder must hold tokenizer.json; got none"),
        ("smoke", ["--tokenizer", "gpt2"], "--tokenizer gpt2 must have at most 2048 entries, .*; got 50257; use --tokenizer bpe"),
        ("rtx3080-10g", ["--dataset-name", "c4", "--dataset-config", "wikitext-2-v1"], "--dataset-config of c4 must be .*; try --dataset-config en"),
        ("rtx3080-10g", ["--dataset-name", "data"], "data must have a train split for --tokenizer auto; got valid; add train.txt"),
        ("smoke", ["--dataset-name", "data"], "data must have a train split for --tokenizer bpe; got valid; add train.txt"),
        ("smoke", ["--dataset-name", "tokens"], "tokens must have a train split for --tokenizer bpe; got none that this tokenizer can read"),
        ("smoke", ["--dataset-name", "empty"], "empty must hold train, valid or test as .*; got none of them; rename the files"),
    ],
)
def test_wrong_names_of_data_end_it_before_any_step(preset, words, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("readme.pdf", "data/valid.txt", "tokens/train.gpt2.bin", "tokens/valid.gpt2.bin", "empty/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.setattr(pipeline, "_run_step", lambda *_: pytest.fail("a step ran"))
    assert main(["pipeline", "--preset", preset, "--out-dir", "out", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"phase1 pipeline: error: {says}", line)
    assert set(re.findall(r"--[a-z][a-z-]+", line)) <= {flag_of(field.name) for field in fields(PipelineRun)}


def test_data_that_were_scored_already_are_not_asked_for_again(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a\nb\n")
    run = PipelineRun(preset="smoke", out_dir=str(tmp_path / "out"), dataset_name=str(text))
    monkeypatch.setattr(pipeline.importlib, "import_module", Step({"throughput": OSError("disk full")}))
    assert pipeline.main(run) == 4
    text.unlink()
    monkeypatch.setattr(pipeline.importlib, "import_module", Step({}))
    assert pipeline.main(replace(run, resume=True)) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_have_the_sizes_of_the_preset_and_share_the_flags(preset):
    run = PipelineRun(preset=preset, out_dir="out", dataset_name="builtin", baseline=False)
    steps = dict(pipeline.steps(run))
    for command, sizes in PRESETS[preset].items():
        if command == "train":  # a model of one's own is no part of the pipeline
            continue
        assert {name: getattr(steps[command], name) for name in sizes} == sizes
        assert steps[command].out_dir == "out" and not steps[command].baseline
    assert steps["perplexity"].dataset_name == "builtin" and steps["tables"].results_dir == "out"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_printed_flags_give_the_same_run(preset):
    for command, config in pipeline.steps(PipelineRun(preset=preset, out_dir="out", baseline=False)):
        assert parse(command, flags(config).split()) == config


def test_an_interrupt_ends_the_pipeline(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline.importlib, "import_module", Step({"memory": KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        pipeline.main(PipelineRun(preset="smoke", out_dir=str(tmp_path)))


def test_the_last_screen_says_how_the_engine_that_was_trained_speaks(tmp_path):
    run = PipelineRun(preset="smoke", out_dir=str(tmp_path))
    assert not any("generate" in line for line in pipeline.next_steps(run, [], []))
    for age, name in enumerate(("baseline-1", "phase1_htt16_ar32-1", "phase1_htt16_ar32-2")):
        index = tmp_path / "checkpoints" / name / "checkpoint.json"
        index.parent.mkdir(parents=True)
        index.write_text("{}")
        os.utime(index, (1e9 - age, 1e9 - age))
    first = next(pipeline.next_steps(run, [], []))
    assert first.startswith(f"phase1 generate --checkpoint {tmp_path}/checkpoints/phase1_htt16_ar32-1 --prompt ")
    assert not any("generate" in line for line in pipeline.next_steps(run, [("memory", "failed")], []))
