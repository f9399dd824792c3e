import gc
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1 import cli
from phase1.cli import COMMANDS, main, parse
from phase1.config import flags, to_toml
from phase1.errors import Unavailable
from phase1.presets import PRESETS
from phase1.runs import CompareRun, TrainRun

SCRIPTS = Path(__file__).parents[1] / "scripts"
DOCUMENTED = {
    "memory": "--batch-size 4 --seq-length 2048 --vocab-size 50257 --d-model 512 --n-layers 8 --ar-ssm-max-rank 32 --htt-rank 16 "
    "--out-dir results/benchmarks",
    "throughput": "--seq-lengths 512 1024 2048 4096 --batch-size 4 --vocab-size 50257 --d-model 512 --n-layers 8 --warmup-steps 5 "
    "--measure-steps 20 --out-dir results/benchmarks",
    "perplexity": "--dataset-name wikitext --dataset-config wikitext-103-raw-v1 --seq-length 512 --batch-size 8 --vocab-size 50257 "
    "--d-model 512 --n-layers 8 --test-htt-ranks 16 --test-ar-ssm-ranks 32 --out-dir results/benchmarks",
    "tables": "--results-dir results/benchmarks --out-dir results/benchmarks/tables --formats markdown csv latex",
}


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_flags_have_the_documented_defaults(command):
    assert parse(command, DOCUMENTED[command].split()) == parse(command, []) == COMMANDS[command]()


@pytest.mark.parametrize(
    "command, flag, field, value",
    [
        ("memory", "--no-baseline", "baseline", False),
        ("memory", "--no-gradient-checkpointing", "gradient_checkpointing", False),
        ("throughput", "--save-plots", "save_plots", True),
        ("perplexity", "--max-samples 7", "max_samples", 7),
        ("perplexity", "--test-htt-ranks 8 16", "test_htt_ranks", (8, 16)),
        ("perplexity", "--checkpoint baseline=a phase1_htt8_ar32=b", "checkpoint", ("baseline=a", "phase1_htt8_ar32=b")),
        ("perplexity", "--learning-rate 1e-4", "learning_rate", 1e-4),
        ("tables", "--hardware MyCard", "hardware", "MyCard"),
    ],
)
def test_a_flag_sets_its_field(command, flag, field, value):
    assert getattr(parse(command, flag.split()), field) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_a_flag_with_help_and_default(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for field in fields(COMMANDS[command]):
        spelling = field.name.upper() if field.metadata.get("positional") else "--" + field.name.replace("_", "-")
        assert spelling in out and field.metadata["help"]
    assert "exit status" in out


@pytest.mark.parametrize(
    "command, preset, expected",
    [
        ("memory", "rtx3080m-8g", {"batch_size": 2, "seq_length": 2048}),
        ("memory", "rtx3080-10g", {"batch_size": 4, "seq_length": 2048}),
        ("memory", "rtx4090-24g", {"batch_size": 8, "seq_length": 4096}),
        ("throughput", "rtx4090-24g", {"batch_size": 8, "seq_lengths": (512, 1024, 2048, 4096, 8192)}),
        ("perplexity", "rtx4090-24g", {"batch_size": 16, "seq_length": 1024}),
        ("perplexity", "rtx3080m-8g", {"batch_size": 4, "seq_length": 512}),
    ],
)
def test_a_preset_sets_what_the_guide_recommends(command, preset, expected):
    run = parse(command, ["--preset", preset])
    assert {name: getattr(run, name) for name in expected} == expected


def test_arguments_by_place_come_with_flags_on_either_side():
    expected = CompareRun(old="a b", new="c", fail_on="peak:+2%")
    assert parse("compare", ["a b", "c", "--fail-on", "peak:+2%"]) == expected
    assert parse("compare", ["--fail-on", "peak:+2%", "a b", "c"]) == expected
    assert flags(expected) == "'a b' c --fail-on peak:+2%"


def test_a_flag_wins_over_the_preset():
    assert parse("memory", ["--preset", "rtx4090-24g", "--batch-size", "3"]).batch_size == 3
    assert parse("memory", ["--batch-size", "3", "--preset", "rtx4090-24g"]).batch_size == 3


def test_a_file_gives_flags_and_a_flag_wins_over_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "smoke"\nseq-lengths = [512, 640]\nsave_plots = true\nbaseline = false\nbatch-size = 3\n')
    run = parse("throughput", ["--config", str(path), "--batch-size", "2"])
    assert (run.batch_size, run.seq_lengths, run.save_plots, run.baseline, run.d_model) == (2, (512, 640), True, False, 128)
    assert parse("throughput", ["--config", str(path), "--preset", "rtx4090-24g"]).d_model == 512


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"compare"}))
def test_a_printed_file_gives_the_same_run(command, tmp_path, capsys):
    path = tmp_path / "run.toml"
    with pytest.raises(SystemExit) as exit:
        main([command, "--print-config"])
    path.write_text(capsys.readouterr().out)
    assert exit.value.code == 0 and parse(command, ["--config", str(path)]) == COMMANDS[command]()


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        TrainRun,
        prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        dataset_name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
        seed=st.integers(0, 2**31),
        learning_rate=st.floats(1e-9, 1e9),
        copy_head=st.booleans(),
        max_hours=st.none() | st.floats(1e-9, 1e9),
        report_to=st.lists(st.sampled_from(["tensorboard", "trackio"]), max_size=2).map(tuple),
    )
)
def test_any_run_survives_its_file(run):
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        file.write(to_toml(run).encode())
        file.flush()
        assert parse("train", ["--config", file.name]) == run


def test_a_printed_file_says_where_a_value_is_from(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("measure-steps = 4\n")
    with pytest.raises(SystemExit):
        main(["throughput", "--preset", "smoke", "--config", str(path), "--batch-size", "2", "--print-config"])
    out = capsys.readouterr().out
    for line in ("batch-size = 2  # flag", f"measure-steps = 4  # {path}", "warmup-steps = 1  # preset smoke", "compile = false  # default"):
        assert line in out.splitlines()


@pytest.mark.parametrize(
    "content, says",
    [
        ("batch-sise = 3", "no flag is called batch-sise; the nearest is batch-size"),
        ("batch-size = 'x'", "--batch-size: invalid int value: 'x'"),
        ("batch-size = ", "must be a readable TOML file"),
        ("batch-size = 0", "--batch-size must be greater than 0"),
        (b"\xff", "must be a readable TOML file"),
        (None, "must be a readable TOML file"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(content, says, tmp_path, capsys):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        code = main(["memory", "--config", str(path)])
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_its_commands(preset):
    for command, values in PRESETS[preset].items():
        assert parse(command, ["--preset", preset]) == COMMANDS[command](**values)


@pytest.mark.parametrize(
    "argv",
    [
        [], ["bogus"], ["memory", "--bogus"], ["memory", "--batch-size", "x"], ["memory", "--batch-size", "0"], ["memory", "--preset", "x"],
        ["memory", "--seq-length", "0"], ["memory", "--d-model", "100"], ["memory", "--htt-rank", "1000"], ["memory", "--batch", "4"],
        ["throughput", "--seq-lengths", "512", "0"], ["tables", "--formats", "html"], ["perplexity", "--test-ar-ssm-ranks", "31"],
        ["perplexity", "--max-samples", "0"], ["perplexity", "--train-batch-size", "63"], ["compare", "old.json"], ["compare", "a", "b", "c"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(argv, capsys):
    try:
        code = main(argv)
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and ": error: " in err


@pytest.mark.parametrize(
    "raised, code",
    [(ValueError("got x"), 2), (Unavailable("no network"), 3), (KeyboardInterrupt(), 130), (OSError(28, "No space left"), 4)],
    ids=["2", "3", "130", "4"],
)
def test_errors_become_one_line_and_their_exit_status(raised, code, monkeypatch, capsys):
    class Command:
        @staticmethod
        def main(run):
            raise raised

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Command)
    assert main(["memory"]) == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("raised", [None, ValueError("no")])
def test_a_command_runs_with_the_garbage_collector_on_and_leaves_nothing_frozen(raised, monkeypatch, capsys):
    def command(run):
        assert gc.isenabled() and gc.get_freeze_count() > 0
        if raised is not None:
            raise raised
        return 0

    monkeypatch.setattr("phase1.commands.tables.main", command)
    assert main(["tables"]) == (0 if raised is None else 2)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_programming_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: None)
    with pytest.raises(AttributeError):
        main(["memory"])


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda p: p.stem)
def test_scripts_show_their_help_at_once(script):
    began = time.perf_counter()
    out = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "exit status" in out.stdout and time.perf_counter() - began < 2
