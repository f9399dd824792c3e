import gc
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import phase1
from phase1 import cli
from phase1.cli import COMMANDS, main, parse
from phase1.config import flags, to_toml
from phase1.data.cache import cache_folder
from phase1.errors import Diverged, Unavailable
from phase1.presets import PRESETS
from phase1.records.schema import Check
from phase1.runs import CompareRun, GenerateRun, TrainRun
from phase1.text import without_private

SCRIPTS = Path(__file__).parents[1] / "scripts"
DOCUMENTED = {
    "memory": "--batch-size 4 --seq-length 2048 --vocab-size 50257 --d-model 512 --n-layers 8 --ar-ssm-max-rank 32 --htt-rank 16 "
    "--out-dir results/benchmarks",
    "throughput": "--seq-lengths 512 1024 2048 4096 --batch-size 4 --vocab-size 50257 --d-model 512 --n-layers 8 --warmup-steps 5 "
    "--measure-steps 20 --out-dir results/benchmarks",
    "perplexity": "--dataset-name wikitext --seq-length 512 --batch-size 8 --vocab-size 50257 "
    "--d-model 512 --n-layers 8 --test-htt-ranks 16 --test-ar-ssm-ranks 32 --out-dir results/benchmarks",
    "tables": "--results-dir results/benchmarks --formats markdown csv latex",
}


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_flags_have_the_documented_defaults(command):
    assert parse(command, DOCUMENTED[command].split()) == parse(command, []) == COMMANDS[command]()


@pytest.mark.parametrize(
    "command, flag, field, value",
    [
        ("memory", "--no-baseline", "baseline", False),
        ("memory", "--no-gradient-checkpointing", "recompute", "none"),
        ("perplexity", "--gradient-checkpointing", "recompute", "block"),
        ("train", "--no-checkpointing", "recompute", "none"),
        ("train", "--recompute=selective", "recompute", "selective"),
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
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
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


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"compare", "check-model", "curves"}))  # which must be given what they are about
def test_a_printed_file_gives_the_same_run(command, tmp_path, capsys):
    path = tmp_path / "run.toml"
    assert main([command, "--print-config"]) == 0
    path.write_text(capsys.readouterr().out)
    assert parse(command, ["--config", str(path)]) == COMMANDS[command]()


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        TrainRun,
        prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        dataset_name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(lambda name: name[0] != "~"),
        seed=st.integers(0, 2**31),
        learning_rate=st.floats(1e-9, 1e9),
        copy_head=st.booleans(),
        max_hours=st.none() | st.floats(1e-9, 1e9),
        report_to=st.lists(st.sampled_from(["tensorboard", "wandb", "trackio"]), max_size=2).map(tuple),
    )
)
def test_any_run_survives_its_file(run):
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        file.write(to_toml(run).encode())
        file.flush()
        assert parse("train", ["--config", file.name]) == run


@pytest.mark.parametrize("text", ["~", "~0", "~/x", "a=~/x"])
def test_no_home_folder_is_looked_for_in_a_prompt(text):
    assert TrainRun(prompt=text).prompt == GenerateRun(prompt=text).prompt == text
    assert parse("generate", shlex.split(flags(GenerateRun(prompt=text)))).prompt == text


def test_a_printed_file_says_where_a_value_is_from(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("measure-steps = 4\n")
    assert main(["throughput", "--preset", "smoke", "--config", str(path), "--batch-size", "2", "--print-config"]) == 0
    out = capsys.readouterr().out
    for line in ("batch-size = 2  # flag", f"measure-steps = 4  # {path}", "warmup-steps = 1  # preset smoke", "compile = false  # default"):
        assert line in out.splitlines()


@pytest.mark.parametrize(
    "content, says",
    [
        ("batch-sise = 3", "no flag is called batch-sise; the nearest is batch-size"),
        ("batch-size = 'x'", 'run.toml: batch-size must be a whole number; got "x"; correct it'),
        ("batch-size = true", "batch-size must be a whole number; got true; correct it"),
        ("batch-size = 1.5", "batch-size must be a whole number; got 1.5; correct it"),
        ("batch_size = nan", "batch_size must be a whole number; got NaN; correct it"),
        ("seq_length = [1]", "seq_length must be a whole number; got [1]; correct it"),
        ("row-norm = true", "row-norm must be a number; got true; correct it"),
        ("row-norm = [1.0]", "row-norm must be a number; got [1.0]; correct it"),
        ("fit = 'yes'", 'fit must be true or false; got "yes"; correct it'),
        ("fit = 1", "fit must be true or false; got 1; correct it"),
        ("gradient-checkpointing = 'yes'", 'gradient-checkpointing must be true or false; got "yes"; correct it'),
        ("out-dir = 1", "out-dir must be a string; got 1; correct it"),
        ("card = 2026-01-01", 'card must be a string; got "2026-01-01"; correct it'),
        ("htt-output = 'x'", "htt-output must be one of 'flat', 'two_level'; got \"x\"; correct it"),
        ("model = ['a=b:c', 1]", "model must be a list, and in it a string; got [\"a=b:c\", 1]; correct it"),
        ("preset = 1", "preset must be a string; got 1; correct it"),
        ("config = 'x'", "run.toml: the key config is not allowed in a file; remove it"),
        ("print-config = true", "print-config is not allowed in a file"),
        ("help = true", "help is not allowed in a file"),
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
    code = main(["memory", "--config", str(path)])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_its_commands(preset):
    for command, values in PRESETS[preset].items():
        assert parse(command, ["--preset", preset]) == COMMANDS[command](**values)


@pytest.mark.parametrize(
    "argv",
    [
        ["bogus"], ["memory", "--bogus"], ["memory", "--batch-size", "x"], ["memory", "--batch-size", "0"], ["memory", "--preset", "x"],
        ["memory", "--seq-length", "0"], ["memory", "--d-model", "100"], ["memory", "--htt-rank", "1000"], ["memory", "--batch", "4"],
        ["throughput", "--seq-lengths", "512", "0"], ["tables", "--formats", "html"], ["perplexity", "--test-ar-ssm-ranks", "31"],
        ["perplexity", "--max-samples", "0"], ["perplexity", "--train-batch-size", "63"], ["compare", "old.json"], ["compare", "a", "b", "c"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(argv, capsys):
    code = main(argv)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and ": error: " in err


NUMBERS = [
    (command, field.name) for command, cls in COMMANDS.items() for field in fields(cls)
    if {"int", "float"} & set(str(field.type).replace("class", "").replace("'", " ").replace("[", " ").replace(",", " ").split())
]  # fmt: skip


@pytest.mark.parametrize("command, name", NUMBERS)
def test_every_number_flag_is_finite_and_no_larger_than_libraries_can_hold(command, name, capsys):
    for value in ("nan", "inf", "-inf", "1e16", "18446744073709551616", "9" * 400):
        code = main([command, *["package.module:factory"] * (command == "check-model"), f"--{name.replace('_', '-')}={value}"])
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and f"--{name.replace('_', '-')}" in err and len(err) < 300, (value, err)


def test_the_numbers_are_all_there():
    assert {("train", "grad_clip"), ("train", "learning_rate"), ("memory", "rank_penalty"), ("perplexity", "stride"),
            ("throughput", "seq_lengths")} <= set(NUMBERS)  # fmt: skip


def raising(error):
    """A command that raises `error`, or what calling it raises."""
    return SimpleNamespace(main=lambda run: error(run) if callable(error) else (_ for _ in ()).throw(error))


OURS = partial(parse, "memory", ["--batch-size", "0"])  # a ValueError that this package raises
LIBRARY = [
    lambda run: np.zeros(2).reshape(3), lambda run: json.loads("{"), lambda run: Check(name=1), lambda run: "é".encode("ascii"),
    lambda run: int("x"), lambda run: Figure(figsize=(float("nan"), 1)), lambda run: {}["key"], lambda run: torch.zeros(2) @ torch.zeros(3),
]  # fmt: skip


@pytest.mark.parametrize(
    "raised, code",
    [(lambda run: OURS(), 2), (Unavailable("no network"), 3), (Diverged("the loss is nan"), 3), (KeyboardInterrupt(), 130), (OSError(28, "No space left"), 4),
     (MemoryError("x"), 3), (RuntimeError("CUDA out of memory."), 3)],
    ids=["2", "3", "diverged", "130", "4", "memory", "GPU memory"],
)  # fmt: skip
def test_errors_become_one_line_and_their_exit_status(raised, code, monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: raising(raised))
    assert main(["memory"]) == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("raised", LIBRARY, ids=range(len(LIBRARY)))
def test_an_error_that_nobody_expected_ends_with_its_traceback_and_a_status_of_its_own(raised, monkeypatch, capsys):
    """Status 1 says that a check fails, 2 that the user is wrong: a library's ValueError is neither."""
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: raising(raised))
    assert main(["memory"]) == 5
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" in lines[0] and lines[-1].startswith("phase1 memory: internal error: ") and "phase1 doctor" in lines[-1]


@pytest.mark.parametrize("raised", [None, Unavailable("no")])
def test_a_command_runs_with_the_garbage_collector_on_and_leaves_nothing_frozen(raised, monkeypatch, capsys):
    def command(run):
        assert gc.isenabled() and gc.get_freeze_count() > 0
        if raised is not None:
            raise raised
        return 0

    monkeypatch.setattr("phase1.commands.tables.main", command)
    assert main(["tables"]) == (0 if raised is None else 3)
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize("encoding", ["cp932", "gbk", "euc_jp", "ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_no_output_fails_on_its_encoding(encoding, errors, monkeypatch):
    """What a Japanese or Chinese locale, or a pipe under one, gives."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    text = "R² T × T ± ≤ 東京 é \udc83 µ"
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=lambda run: print(text) or 0))
    assert main(["memory"]) == 0
    assert stream.errors == errors
    stream.flush()
    printed = stream.buffer.getvalue().decode(encoding)
    if encoding == "ascii":
        assert printed == "R^2 T x T +/- <= ?? ? ? u\n"
    assert printed.startswith(("R² T", "R^2 T")) and ("東京" in printed) == (encoding not in ("ascii", "latin-1"))


PAUSED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
from phase1.cli import main
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.9, 1.8])
def test_a_signal_at_any_moment_of_a_start_ends_with_one_line_and_status_130(number, seconds, tmp_path):
    argv = ["memory", "--out-dir", str(tmp_path), "--seq-length", "64"]
    environment = os.environ | {"PYTHONPATH": str(Path(phase1.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    time.sleep(seconds)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("phase1 memory: interrupted;"), err


@pytest.mark.parametrize("flag", ["--out-dir=~/x", "--out-dir ~/x", "--out-dir=~"])
def test_a_tilde_is_the_home_folder_in_every_spelling(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/ann")
    assert parse("memory", flag.split()).out_dir.startswith("/somewhere/ann")
    run = parse("perplexity", ["--dataset-name=~/a.txt", "--checkpoint", "baseline=~/b", "phase1_htt1_ar2=c~d", "--cache-dir=~/c"])
    assert run.dataset_name == "/somewhere/ann/a.txt" and run.cache_dir == "/somewhere/ann/c"
    assert run.checkpoint == ("baseline=/somewhere/ann/b", "phase1_htt1_ar2=c~d")
    assert flags(parse("perplexity", [])) == "" and flags(run).startswith("--dataset-name /somewhere/ann/a.txt")


def test_a_user_without_a_home_gets_a_folder_for_the_cache_and_an_error_for_a_tilde(monkeypatch, capsys):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does where HOME is unset and the user unknown
    run = parse("perplexity", [])
    cache_folder.cache_clear()
    for _ in range(2):
        assert cache_folder(run.cache_dir).is_relative_to(tempfile.gettempdir())
    assert capsys.readouterr().err.count("no home folder") == 1
    assert without_private("/somewhere/x") == "/somewhere/x"
    assert main(["memory", "--out-dir", "~/x"]) == 2
    assert "--out-dir must be a path that this system knows; got ~/x" in capsys.readouterr().err
    cache_folder.cache_clear()


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_scripts_show_their_help_at_once(script):
    began = time.perf_counter()
    out = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "exit status" in out.stdout and time.perf_counter() - began < 2


def test_help_and_version_are_statuses_too(capsys):
    assert main(["--help"]) == main(["--version"]) == 0 and "start here:" in capsys.readouterr().out


def test_without_a_command_the_help_says_where_to_start(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "start here:" in out and "phase1 pipeline --preset smoke" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_can_be_typed_and_no_default_that_is_none(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert not any(words in out for words in ("default: None", "default: ()", "default: (", "default: False"))
    examples = [line.split(None, 2) for line in out.split("examples:")[1].splitlines() if line.startswith("  phase1 ")]
    assert examples
    for _, name, *arguments in examples:
        parse(name, shlex.split(arguments[0]) if arguments else [])


@pytest.mark.parametrize(
    "command, flag, near",
    [
        ("memory", "--batch_size", "--batch-size"),
        ("throughput", "--seq-len", "--seq-lengths"),
        ("tables", "--format", "--formats"),
        ("perplexity", "--htt-ranks", "--test-htt-ranks"),
    ],
)
def test_an_unknown_flag_is_answered_with_those_like_it(command, flag, near, capsys):
    assert main([command, flag, "1"]) == 2
    err = capsys.readouterr().err
    assert f"unrecognized arguments: {flag}" in err and "did you mean" in err and near in err
    assert main([command, "--zzzzqqq"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["trian"], "did you mean train?"), (["train", "--lr", "1"], "did you mean --learning-rate?"), (["memory", "--dataset", "x"], "unrecognized"),
        (["train", "--epochs", "3"], "did you mean --train-tokens?"), (["train", "--train-tokens", "1.5"], "invalid integer value: '1.5'"),
    ],
)  # fmt: skip
def test_what_other_tools_call_it_is_known(words, says, capsys):
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_values_of_a_file_have_the_types_of_their_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("train-tokens = 1e6\nlearning-rate = 1\nreport-to = 'wandb'\ncheckpointing = false\neval-every = 3\n")
    run = parse("train", ["--config", str(path)])
    assert (run.train_tokens, run.learning_rate, run.report_to, run.recompute, run.eval_every) == (10**6, 1, ("wandb",), "none", 3)


@pytest.mark.parametrize(
    "command, flag, value, says",
    [
        ("generate", "--temperature", "-1", "--temperature must be 0 or more; got -1.0; raise it"),
        ("generate", "--seed", "-1", "--seed must be 0 or more; got -1; raise it"),
        ("generate", "--seed", "18446744073709551615", "--seed must be at most 10^15; got 18446744073709551615; give a smaller one"),
        ("generate", "--seed", "-18446744073709551615", "--seed must be at least -10^15; got -18446744073709551615; give a larger"),
        ("generate", "--temperature", "inf", "--temperature must be a finite number of at most 10^15; got inf"),
        ("train", "--warmup-steps", "-2", "--warmup-steps must be 0 or more; got -2; raise it"),
        ("train", "--weight-decay", "-0.5", "--weight-decay must be 0 or more; got -0.5; raise it"),
        ("train", "--eval-every", "-3", "--eval-every must be 0 or more; got -3; raise it"),
        ("train", "--sample-every", "-3", "--sample-every must be 0 or more; got -3; raise it"),
        ("memory", "--rank-penalty", "-3", "--rank-penalty must be 0 or more; got -3.0; raise it"),
        ("memory", "--ar-ssm-window", "-3", "--ar-ssm-window must be 0 or more; got -3; raise it"),
        ("memory", "--htt-dense-rows", "-3", "--htt-dense-rows must be 0 or more; got -3; raise it"),
        ("memory", "--logit-scale", "-3", "--logit-scale must be 0 or more; got -3.0; raise it"),
        ("memory", "--input-scale", "-3", "--input-scale must be greater than 0; got -3.0; give a positive number"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_flag_alone(command, flag, value, says, capsys):
    assert main([command, f"{flag}={value}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"phase1 {command}: error: {says}") and err.count("\n") == 1


def test_a_million_can_be_written_short():
    assert parse("train", ["--train-tokens", "1e6"]).train_tokens == 10**6


@pytest.mark.parametrize("command, flag, says", [("train", "--max-hours", True), ("perplexity", "--max-samples", True), ("memory", "--batch-size", False)])
def test_zero_is_refused_and_what_may_be_left_out_says_so(command, flag, says, capsys):
    assert main([command, flag, "0"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{flag} must be greater than 0" in err and err.rstrip().endswith("or leave it out") == says
