"""No flag without an effect: every field of a run is read by its command, outside the list of settings in the report."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from phase1.commands import (
    check_model,
    compare,
    curves,
    export,
    generate,
    memory,
    perplexity,
    pipeline,
    report,
    tables,
    throughput,
    train,
)
from phase1.records import session
from phase1.records.metrics import FIELDS, METRICS
from phase1.runs import (
    CheckModelRun,
    CompareRun,
    CurvesRun,
    ExportRun,
    GenerateRun,
    MemoryRun,
    PerplexityRun,
    PipelineRun,
    ReportRun,
    TablesRun,
    ThroughputRun,
    TrainRun,
)
from tests.generation.test_decoder import checkpoint  # noqa: F401, a fixture

SHAPE = {
    "vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "ar_ssm_min_rank": 2, "ar_ssm_window": 4, "htt_dense_rows": 4,
    "htt_groups": 10,
}  # fmt: skip
RESULTS = str(Path(__file__).parents[2] / "results" / "archive" / "h100")
RANKS = {"ar_ssm_max_rank": 4, "htt_rank": 2}


def watched(run):
    """`run`, and the set of its fields that have been read since."""
    names, seen = {field.name for field in fields(run)}, set()

    class Watched(type(run)):
        def __getattribute__(self, name):
            if name in names:
                seen.add(name)
            return super().__getattribute__(name)

    object.__setattr__(run, "__class__", Watched)
    return run, seen


@pytest.fixture(autouse=True)
def settings_are_not_read(monkeypatch):
    """The report lists every setting; that must not count as an effect."""
    for module, name in (
        (session, "settings"),
        (session, "deciding_settings"),
        (perplexity, "settings"),
        (pipeline, "deciding_settings"),
    ):
        monkeypatch.setattr(module, name, lambda run: {})


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train.txt").write_text("the cat sees the dog . a dog sees the cat .\n" * 40)
    (tmp_path / "valid.txt").write_text("the dog sees a cat .\n" * 5)
    return {"dataset_name": str(tmp_path), "tokenizer": "bpe", "cache_dir": str(tmp_path / "cache")}


def trained(folder):
    """A folder of a training that has begun."""
    folder.mkdir()
    row = dict.fromkeys(FIELDS) | {"session": 1, "step": 1, "tokens": 8, "loss": 5.0}
    (folder / METRICS).write_text(json.dumps(row) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    "command",
    ["memory", "throughput", "perplexity", "train", "generate", "export", "tables", "report", "compare", "curves", "pipeline", "check-model"],
)
def test_every_flag_is_read_by_its_command(command, data, tmp_path, monkeypatch, checkpoint):  # noqa: F811
    out = {"out_dir": str(tmp_path / "out")}
    short = {"seq_length": 8, "train_tokens": 64, "train_batch_size": 4, "micro_batch_size": 4}
    runs = {
        "memory": (memory, lambda: MemoryRun(**SHAPE, **RANKS, **out, batch_size=1, seq_length=8)),
        "throughput": (
            throughput,
            lambda: ThroughputRun(
                **SHAPE,
                **RANKS,
                **out,
                batch_size=1,
                seq_lengths=(8, 16),
                warmup_steps=1,
                measure_steps=1,
                decode=True,
                decode_contexts=(4, 8),
            ),
        ),
        "perplexity": (
            perplexity,
            lambda: PerplexityRun(
                **SHAPE, **data, **out, **short, test_htt_ranks=(2,), test_ar_ssm_ranks=(4,), checkpoint_dir=str(tmp_path / "c")
            ),
        ),
        "train": (train, lambda: TrainRun(**SHAPE, **RANKS, **data, **out, **short)),
        "generate": (generate, lambda: GenerateRun(checkpoint=str(checkpoint), max_tokens=2)),
        "export": (export, lambda: ExportRun(**out, checkpoint=str(checkpoint))),
        "tables": (tables, lambda: TablesRun(**out, results_dir=RESULTS)),
        "report": (report, lambda: ReportRun(results_dir=RESULTS, out=str(tmp_path / "r.html"), against=RESULTS)),
        "compare": (compare, lambda: CompareRun(old=RESULTS, new=RESULTS, fail_on="peak:+2%")),
        "curves": (curves, lambda: CurvesRun(folders=(trained(tmp_path / "run"),), out=str(tmp_path / "c.svg"))),
        "check-model": (check_model, lambda: CheckModelRun(own_model="examples.peers.ar_ssm:ar_ssm", d_model=16, seq_length=8)),
        "pipeline": (pipeline, lambda: PipelineRun(**out, preset="smoke")),
    }
    module, make = runs[command]
    if command == "pipeline":
        monkeypatch.setattr(pipeline.importlib, "import_module", lambda name: memory)
        monkeypatch.setattr(memory, "main", lambda run: 0)
    run, seen = watched(make())
    module.main(run)
    unread = {field.name for field in fields(run)} - seen
    if command in ("perplexity", "train"):
        unread -= {"dataset_config"}  # of hub data sets alone: tests/data/test_hub.py
    assert unread == set()
