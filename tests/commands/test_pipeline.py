import os

import pytest

from phase1.cli import parse
from phase1.commands import pipeline
from phase1.config import flags
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


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_have_the_sizes_of_the_preset_and_share_the_flags(preset):
    run = PipelineRun(preset=preset, out_dir="out", dataset_name="builtin", baseline=False)
    steps = dict(pipeline.steps(run))
    for command, sizes in PRESETS[preset].items():
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
