"""The page about models, mixers and metrics of one's own: its files are written, and every command in it runs, at tiny sizes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phase1.cli import main
from phase1.records.schema import read_report
from phase1.tables.perplexity import perplexity_comparison

PAGES = ("docs/extending.md", "docs/ja/extending.md")
ROOT = Path(__file__).parents[1]
SHAPE = "--vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2"
ENGINE = f"{SHAPE} --ar-ssm-min-rank 2 --ar-ssm-window 4 --htt-dense-rows 4 --htt-groups 10"
TEXT = "--dataset-name text --tokenizer bpe --cache-dir cache --seq-length 8 --train-tokens 64 --train-batch-size 4"
TRAINED = f"{ENGINE} {TEXT} --micro-batch-size 4"
TINY = {
    "check-model": f"{SHAPE} --seq-length 16",
    "memory": f"{ENGINE} --ar-ssm-max-rank 4 --htt-rank 2 --batch-size 1 --seq-length 8",
    "throughput": f"{ENGINE} --ar-ssm-max-rank 4 --htt-rank 2 --batch-size 1 --seq-lengths 8 16 --warmup-steps 1 --measure-steps 1",
    "perplexity": f"{TRAINED} --test-ar-ssm-ranks 4 --test-htt-ranks 2 --checkpoint-dir checkpoints",
    "train": f"{TRAINED} --ar-ssm-max-rank 4 --htt-rank 2 --out-dir trained",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_both_pages_have_the_same_code():
    ours, theirs = (
        [re.sub(r'""".*?"""', "", block) for kind in ("python", "bash") for block in blocks(page, kind)] for page in PAGES
    )
    assert ours == theirs and len(ours) > 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of the page, and a text."""
    folder = tmp_path_factory.mktemp("extending")
    for block in blocks(PAGES[0], "python"):
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text("the cat sees the dog . a dog sees the cat .\n" * 40)
    (folder / "text" / "valid.txt").write_text("the dog sees a cat .\n" * 5)
    return folder


def test_every_command_of_the_page_runs(folder, monkeypatch, capsys):
    """Statuses: 0, or 1 and 3 where so little training proves nothing."""
    monkeypatch.chdir(folder)
    ran = [line for block in blocks(PAGES[0], "bash") for line in block.splitlines()]
    for line in ran:
        program, *words = shlex.split(line)
        if program == "phase1":
            sizes = [word for word in shlex.split(TINY[words[0]])]
            if "--fit" in words:
                sizes += ["--no-baseline"]
                words = ["500MB" if word == "20GB" else word for word in words if word != "--fit"]
            status = main([words[0], *sizes, *words[1:]])
            assert status in (0, 1, 3), f"{line}: {capsys.readouterr().err}"
            assert words[0] != "check-model" or status == 0, capsys.readouterr().out
        else:
            out = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout
            assert "tokens/s for a million parameters" in out
    assert len(ran) > 8
    folder_of = Path("results/benchmarks")
    report = read_report(folder_of / "phase1_perplexity_validation.json", "perplexity")  # of the last such command
    mean = report.results["mean"]
    assert mean.status == "ok" and re.fullmatch(r"my_mixer:build@[0-9a-f]{12}", mean.config["model"])
    assert mean.training["learning_rate"] == report.results["ar_ssm_dense_no_copy"].training["learning_rate"]
    assert "Asked of mean and of baseline: 300 and 300 tokens of vocabulary, width 16 and 16, 1 and 1 layers." in perplexity_comparison(report).notes
    assert len({result.trained_tokens for result in report.results.values()}) == 1
    (groups,) = (note for note in perplexity_comparison(report).notes if note.startswith("Optimizer groups of "))
    counts = [int(count.replace(",", "")) for count in re.findall(r"[\d,]+(?= of| parameters)", groups.partition("mean: ")[2])]
    assert len(counts) == 3 and all(counts[:2]) and sum(counts) == mean.parameters.total
    speeds = read_report(folder_of / "phase1_throughput_benchmark.json", "throughput")
    assert speeds.results["baseline"].config["model"].startswith("my_model:build@")
    index = json.loads(Path("trained/checkpoint.json").read_text())
    assert index["model_config"]["model"].startswith("my_model:build@")


def test_the_example_of_a_peer_is_ar_ssm_itself():
    """examples/peers/ar_ssm.py: the model that `ar_ssm_dense_no_copy` is, by its parameters."""
    import torch

    from phase1.config import ModelShape
    from phase1.measure.perplexity.candidates import variant
    from phase1.model import LanguageModel
    from phase1.roster import model_config, own_models
    from phase1.trainable import build

    shape = ModelShape(vocab_size=300, d_model=16, n_layers=1, n_heads=2, ar_ssm_min_rank=2, htt_dense_rows=4, htt_groups=10)
    ranks = {"ar_ssm_max_rank": 4, "htt_rank": 2}
    torch.manual_seed(0)
    ours = LanguageModel(variant("ar_ssm_dense_no_copy", model_config("phase1", shape, **ranks)))
    torch.manual_seed(0)
    theirs = build(own_models(("examples.peers.ar_ssm:ar_ssm",), shape, **ranks)["ar_ssm"])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["wide", "hybrid", "qk_norm", "conv", "gate"])
def test_parts_of_a_block_are_where_they_should_be(name):
    from phase1.config import ModelShape
    from phase1.layers.ar_ssm import ARSSM
    from phase1.roster import own_models
    from phase1.trainable import build

    shape = ModelShape(vocab_size=50, d_model=16, n_layers=8, n_heads=2, ar_ssm_min_rank=2, htt_dense_rows=4, htt_groups=10)
    model = build(own_models((f"examples.peers.parts:{name}",), shape, ar_ssm_max_rank=4, htt_rank=2)[name])
    mixers = [block.mixer for block in model.blocks]
    if name in ("wide", "hybrid"):
        windows = [mixer.window if isinstance(mixer, ARSSM) else None for mixer in mixers]
        assert windows == [64, 64, 64, 512 if name == "wide" else None] * 2
    else:
        has = {"qk_norm": "q_scale", "conv": "conv_weight", "gate": "norm"}
        assert all([n for n, part in has.items() if getattr(mixer, part) is not None] == [name] for mixer in mixers)


def test_the_table_of_peers_joins_quality_and_speed(tmp_path, capsys):
    from examples.peers import table
    from phase1.records.schema import FILES, Dataset, write_report
    from tests.reports import perplexity_report, perplexity_result, throughput_report

    for text, perplexity in (("wikipedia", 30.0), ("wikitext103", 40.0)):
        dataset = Dataset(name=text, split="valid", sha256="ab" * 32)
        scored = {"baseline": perplexity_result("baseline", perplexity, dataset=dataset)}
        (tmp_path / "some" / text).mkdir(parents=True)
        write_report(perplexity_report(results=scored, checks=[]), tmp_path / "some" / text / FILES["perplexity"])
    (tmp_path / "speed" / "baseline").mkdir(parents=True)
    write_report(throughput_report(), tmp_path / "speed" / "baseline" / FILES["throughput"])
    table.main(tmp_path)
    (row,) = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert (row["perplexity_wikipedia"], row["perplexity_wikitext103"]) == (30.0, 40.0)
    assert row["tokens_per_s"] == pytest.approx(4 * 512 / 0.021, rel=0.01) and row["mixer_parameters"]
    assert re.search(r"\| baseline \| [\d,]+ \| [\d,]+ \| 30\.00 \| 40\.00 \| [\d,]+ \|", capsys.readouterr().out)
