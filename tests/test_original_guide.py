"""The document that users come with, tests/fixtures/original_guide.ja.md: its commands do what it says, at tiny sizes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phase1.cli import main, parse
from phase1.data.tokenizer_files import gpt2_tokenizer
from phase1.records.schema import FILES, read_report
from phase1.stats.scaling import fit_scaling
from tests.reports import write_all

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "tests/fixtures/original_guide.ja.md").read_text()
SCRIPTS = {
    "validate_phase1_memory.py": "memory",
    "benchmark_phase1_throughput.py": "throughput",
    "validate_phase1_perplexity.py": "perplexity",
    "generate_phase1_comparison_tables.py": "tables",
}
SHAPE = "--vocab-size 300 --d-model 32 --n-layers 1 --n-heads 2 --ar-ssm-min-rank 2 --ar-ssm-window 8 --htt-dense-rows 16 --htt-groups 16"
RANKS = "--ar-ssm-max-rank 8 --htt-rank 4"
TABLES = ("memory", "throughput", "scaling", "perplexity", "configuration")


def typed():
    """(script, arguments) of every command of the guide, as it stands there."""
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and words[1].startswith("scripts/"):
                yield Path(words[1]).name, words[2:]


COMMANDS = list(typed())
IDS = [f"{SCRIPTS[script]} {' '.join(arguments)}"[:80] for script, arguments in COMMANDS]


def of(command):
    return [arguments for script, arguments in COMMANDS if SCRIPTS[script] == command]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("the cat sees the dog . a dog sees the cat .\n" * 60)
    (tmp_path / "text" / "valid.txt").write_text("the dog sees a cat .\n" * 8)
    return tmp_path / "text"


def test_the_guide_has_its_commands():
    assert len(COMMANDS) == 22 and {script for script, _ in COMMANDS} == set(SCRIPTS)
    assert all((ROOT / "scripts" / script).exists() for script in SCRIPTS)


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=IDS)
def test_every_command_is_accepted_as_it_is_typed(script, arguments):
    parse(SCRIPTS[script], arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_from_a_checkout_that_is_not_installed(script, tmp_path):
    """Items 1 and 15 of the guide: its list of packages and a checkout, nothing else."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and f"phase1 {SCRIPTS[script]}" in done.stdout, done.stderr


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "pydantic").mkdir()
    (tmp_path / "pydantic" / "__init__.py").write_text('raise ModuleNotFoundError("No module named \'pydantic\'", name="pydantic")')
    command = [sys.executable, str(ROOT / "scripts" / "generate_phase1_comparison_tables.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert "the Python package pydantic is not installed; run: pip install pydantic" in done.stderr


def test_the_default_vocabulary_needs_no_download():
    assert gpt2_tokenizer().vocab_size == parse("perplexity", []).vocab_size == 50257


def test_the_defaults_are_the_documented_ones():
    memory, throughput, perplexity = (parse(command, []) for command in ("memory", "throughput", "perplexity"))
    assert (memory.batch_size, memory.seq_length, memory.recompute) == (4, 2048, "block")
    assert throughput.seq_lengths == (512, 1024, 2048, 4096)
    assert (perplexity.dataset_name, perplexity.seq_length, perplexity.batch_size) == ("wikitext", 512, 8)
    assert memory.out_dir == throughput.out_dir == perplexity.out_dir == "results/benchmarks"


@pytest.mark.parametrize("arguments", of("memory"), ids=" ".join)
def test_memory_commands_end_in_the_promised_file_and_verdicts(arguments, capsys):
    code = main(["memory", *arguments, "--dry-run", *f"{SHAPE} {RANKS} --batch-size 2 --seq-length 64".split()])
    report = read_report(Path("results/benchmarks/phase1_memory_validation.json"), "memory")
    assert [check.name for check in report.checks] == ["fits_8gb", "fits_10gb", "reduction_50_percent"]
    assert [check.limit for check in report.checks] == [7.2e9, 9.0e9, 50.0]
    assert code in (0, 1) and all(check.status != "inconclusive" for check in report.checks)
    engine = report.results["phase1"]
    assert engine.peak_forward_bytes and engine.peak_backward_bytes and engine.memory_reduction_percent is not None
    out = capsys.readouterr().out
    assert all(words in out for words in ("8 GB card", "10 GB card", "peak", "below the Transformer"))


def test_the_sizes_of_the_24_gb_card_decide_though_its_baseline_does_not_fit(capsys):
    """Item 24: the Transformer needs more than the card has; that is an answer, with its need shown."""
    arguments = next(arguments for arguments in of("memory") if arguments == ["--batch-size", "8", "--seq-length", "4096"])
    assert main(["memory", *arguments, "--dry-run", "--card", "RTX 4090", "--n-layers", "2"]) == 0
    report = read_report(Path("results/benchmarks/phase1_memory_validation.json"), "memory")
    baseline, checks = report.results["baseline"], {check.name: check for check in report.checks}
    assert baseline.status == "oom" and baseline.peak_reserved_bytes + baseline.outside_allocator_bytes > 21.6e9
    assert checks["reduction_50_percent"].status == "pass" and "does not fit" in checks["reduction_50_percent"].detail
    assert checks["fits_rtx4090"].status == "pass"
    assert re.search(r"Transformer .*GB .*does not fit", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", of("throughput"), ids=" ".join)
def test_throughput_commands_end_in_the_promised_file_and_verdicts(arguments, capsys):
    lengths = " ".join(str(length // 16) for length in parse("throughput", arguments).seq_lengths)
    tiny = f"{SHAPE} {RANKS} --batch-size 1 --warmup-steps 1 --measure-steps 5 --seq-lengths {lengths}"
    assert main(["throughput", *arguments, *tiny.split()]) in (0, 1, 3)
    report = read_report(Path("results/benchmarks/phase1_throughput_benchmark.json"), "throughput")
    checks = {check.name: check for check in report.checks}
    assert checks["r_squared"].limit == 0.95 and checks["scaling_linear"].detail
    fit = report.results["phase1"].scaling
    assert all(m.tokens_per_second and m.ratio_to_baseline for m in report.results["phase1"].measurements)
    assert Path("results/benchmarks/phase1_throughput_comparison.png").exists() == ("--save-plots" in arguments)
    out = capsys.readouterr().out
    assert all(words in out for words in ("tokens/s", "linear in T", "R²", "engine / fastest"))
    if len(lengths.split()) == 3:  # item 23
        assert checks["scaling_linear"].status == "inconclusive" and fit.complexity_order
        assert all("add T = 16 or 256" in check.detail for check in report.checks)
        assert "lengths that can decide" in out


def test_three_lengths_name_the_two_that_would_decide():
    (lengths,) = {parse("throughput", a).seq_lengths for a in of("throughput") if len(parse("throughput", a).seq_lengths) == 3}
    detail = fit_scaling(lengths, [0.01 * n for n in lengths]).detail
    assert "add T = 256 or 4,096 (--seq-lengths 256 512 1024 2048, or --seq-lengths 512 1024 2048 4096)" in detail
    for decided in ((256, 512, 1024, 2048), (512, 1024, 2048, 4096)):
        assert fit_scaling(decided, [0.01 * n for n in decided]).verdict == "linear"


@pytest.mark.parametrize("arguments", of("perplexity"), ids=" ".join)
def test_perplexity_commands_end_in_the_promised_file_and_verdicts(arguments, text, capsys):
    ranks = {"16": "4", "8": "2", "32": "6", "64": "8"}
    asked = parse("perplexity", arguments)
    htt, ar = (" ".join(ranks[str(r)] for r in sizes) for sizes in (asked.test_htt_ranks, asked.test_ar_ssm_ranks))
    tiny = (
        f"{SHAPE} --dataset-name {text} --tokenizer bpe --cache-dir cache --checkpoint-dir checkpoints --train-tokens 256 "
        f"--train-batch-size 4 --micro-batch-size 4 --batch-size 4 --seq-length 16 --test-htt-ranks {htt} --test-ar-ssm-ranks {ar}"
    )
    words = list(arguments)
    if asked.dataset_config is not None:  # of the hub's text, for which `text` stands
        at = words.index("--dataset-config")
        del words[at : at + 2]
    assert main(["perplexity", *words, *tiny.split()]) in (0, 1, 3)
    report = read_report(Path("results/benchmarks/phase1_perplexity_validation.json"), "perplexity")
    assert len(report.results) == 1 + len(asked.test_htt_ranks) * len(asked.test_ar_ssm_ranks)
    assert all(result.perplexity and result.bits_per_byte for result in report.results.values())
    assert all(check.limit == 5.0 for check in report.checks)
    out = capsys.readouterr().out
    assert all(words in out for words in ("perplexity", "bits/byte", "vs Transformer", "limit 5.00 %"))


@pytest.mark.parametrize("arguments", of("tables"), ids=" ".join)
def test_tables_commands_write_the_five_tables_in_three_formats(arguments, tmp_path):
    write_all(tmp_path / "results" / "benchmarks")
    assert main(["tables", *arguments]) == 0
    for name in TABLES:
        for suffix in (".md", ".csv", ".tex"):
            assert (tmp_path / "results/benchmarks/tables" / f"{name}_comparison{suffix}").stat().st_size > 100


@pytest.mark.parametrize(
    "command, flags",
    [
        ("memory", "--batch-size 1"),
        ("memory", "--seq-length 512"),
        ("memory", "--ar-ssm-max-rank 16"),
        ("throughput", "--batch-size 2"),
        ("throughput", "--seq-length 1024"),
        ("throughput", "--ar-ssm-max-rank 16"),
        ("perplexity", "--batch-size 2"),
        ("perplexity", "--seq-length 512"),
        ("perplexity", "--ar-ssm-max-rank 16"),
        ("perplexity", "--htt-rank 8"),
    ],
)
def test_what_it_advises_when_memory_runs_out_is_accepted_everywhere(command, flags):
    parse(command, flags.split())


def test_one_length_and_one_rank_are_those_of_the_commands_that_take_several():
    assert parse("throughput", ["--seq-length", "1024"]).seq_lengths == (1024,)
    run = parse("perplexity", ["--ar-ssm-max-rank", "16", "--htt-rank", "8"])
    assert (run.test_ar_ssm_ranks, run.test_htt_ranks) == ((16,), (8,))


def test_a_bug_report_has_what_it_asks_for(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(fact in out for fact in ("torch", "gpu", "gpu_memory_bytes", "cuda", "driver"))


def test_its_references_exist():
    for link in re.findall(r"\]\(\.\./(specs/[^)]*)\)", GUIDE):
        assert (ROOT / link).is_file()


def test_the_result_files_are_plain_json(tmp_path):
    write_all(tmp_path)
    for name in FILES.values():
        assert json.loads((tmp_path / name).read_text())["schema_version"]
