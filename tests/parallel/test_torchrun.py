"""Commands as torchrun starts them: what they print and leave, and how they end."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from safetensors.torch import load_file
from torch.distributed import run as torch_run

from phase1.checks.regression import differences
from phase1.cli import main, parse
from phase1.commands import perplexity, train
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.measure.perplexity.candidates import candidates
from phase1.measure.perplexity.result import train_model, training_of
from phase1.measure.perplexity.side_by_side import train_side_by_side
from phase1.records.metrics import METRICS, read_metrics
from phase1.records.schema import read_report
from phase1.roster import model_config
from phase1.runs import PerplexityRun
from phase1.training.checkpoint import INDEX, load_model, read_index
from tests.parallel.test_ranks import ROOT, torchrun
from tests.parallel.worker import TINY

SHAPE = "--vocab-size 300 --d-model 16 --n-layers 1 --n-heads 2 --ar-ssm-min-rank 2 --ar-ssm-window 4 --htt-dense-rows 4 --htt-groups 10"
RANKS = "--ar-ssm-max-rank 4 --htt-rank 2"
TRAIN = "--seq-length 8 --train-tokens 640000 --train-batch-size 4 --micro-batch-size 2 --eval-every 0"
PERPLEXITY = "--seq-length 8 --train-tokens 64 --train-batch-size 4 --micro-batch-size 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_text("the cat sees the dog . a dog sees the cat .\n" * 40)
    (folder / "valid.txt").write_text("the dog sees a cat .\n" * 5)
    return ["--dataset-name", str(folder), "--tokenizer", "bpe", "--cache-dir", str(folder / "cache")]


def ours(text):
    return [line for line in text.splitlines() if line.startswith("phase1 train")]


@pytest.mark.parametrize("number, flag", [(signal.SIGKILL, ""), (signal.SIGKILL, "--context-parallel"), (signal.SIGTERM, "")])
def test_a_run_ends_with_any_of_its_ranks_and_one_line_says_which(data, tmp_path, number, flag):
    """SIGKILL of any rank at any moment, while every step is kept; and SIGTERM of torchrun, which interrupts all: a checkpoint is left."""
    victim, seconds = random.randrange(2), random.uniform(0, 3)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from phase1 import cli\n"
        "from phase1.training import job\n"
        f"job.SAVE_SECONDS = {0.0 if number == signal.SIGKILL else 1000.0}\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), "train"]
    words = f"{SHAPE} {RANKS} {TRAIN} {flag}".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        agent = subprocess.Popen([*command, *words, *data, "--out-dir", str(tmp_path / "out")], stdout=file, stderr=file, env=environment)
        deadline = time.monotonic() + 120
        while "step 2/" not in log.read_text():
            assert agent.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        ranks = {int(p.environ()["RANK"]): p for p in psutil.Process(agent.pid).children() if "RANK" in p.environ()}
        time.sleep(seconds)
        began = time.monotonic()
        os.kill(ranks[victim].pid if number == signal.SIGKILL else agent.pid, number)
        assert agent.wait(60) != 0
    assert time.monotonic() - began < 30
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())
    (line,) = ours(log.read_text())
    where = f"rank {victim} after {seconds} s: {log.read_text()}"
    if number == signal.SIGKILL:
        assert re.match(rf"phase1 train( \(rank 1 of 2\))?: error: rank {victim} of 2 was ended", line), where
        index = read_index(tmp_path / "out")
        assert index["step"] > 0 and all(load_file(tmp_path / "out" / name) for name in index["files"].values()), where
    else:
        assert line == "phase1 train: interrupted; older results are untouched; the same command goes on from its checkpoint"
        assert not read_index(tmp_path / "out")["facts"]["finished"]


def test_memory_that_runs_out_on_one_rank_ends_all_with_its_line(data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from phase1 import cli, world\n"
        "from phase1.training import step\n"
        "take = step.train_step\n"
        "def short(*arguments):\n"
        "    if world.rank() == 1:\n"
        "        raise MemoryError('out of memory: 1 GB')\n"
        "    return take(*arguments)\n"
        "step.train_step = short\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = torchrun(2, script, "train", *f"{SHAPE} {RANKS} {TRAIN}".split(), *data, "--out-dir", tmp_path / "out")
    (line,) = ours(done.stderr)
    assert done.returncode and line.startswith("phase1 train (rank 1 of 2): error: out of memory: 1 GB; try --micro-batch-size 1")
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_batch_that_ranks_cannot_share_is_refused_before_there_is_a_model(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.group, "size", lambda: 2)
    monkeypatch.setattr(train, "plan", lambda *_: pytest.fail("a plan"))
    words = f"{SHAPE} {RANKS} {TRAIN} --train-batch-size 3 --micro-batch-size 3".split()
    assert main(["train", *words, *data, "--out-dir", str(tmp_path)]) == 2
    assert "--train-batch-size must be a multiple of the 2 ranks; got 3; start 1" in capsys.readouterr().err


def test_models_that_ranks_cannot_train_are_refused_before_one_is_trained_or_scored(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(perplexity.group, "size", lambda: 3)
    monkeypatch.setattr(perplexity, "measure", lambda *_: pytest.fail("a model"))
    words = f"{SHAPE} --test-ar-ssm-ranks 4 --test-htt-ranks 2 {PERPLEXITY} --checkpoint-dir {tmp_path}".split()
    assert main(["perplexity", *words, *data, "--out-dir", str(tmp_path / "out")]) == 2
    assert "--train-batch-size must be a multiple of the 3 ranks; got 4; start 2, or change it" in capsys.readouterr().err


def test_throughput_of_two_ranks_and_no_comparison_with_one(tmp_path):
    words = f"throughput {SHAPE} {RANKS} --seq-lengths 8 --batch-size 1 --warmup-steps 1 --measure-steps 5 --no-baseline".split()
    done = torchrun(2, "-m", "phase1", *words, "--out-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s at T =") == 1 and "engine on 2 processes at T = 8: " in done.stdout
    assert "next  torchrun --nproc-per-node=2 -m phase1 throughput " in done.stdout
    report = read_report(tmp_path / "two" / "phase1_throughput_benchmark.json", "throughput")
    assert (report.environment["world_size"], report.environment["backend"]) == (2, "gloo")
    assert report.command.startswith("torchrun --nproc-per-node=2 -m phase1 throughput ")
    (m,) = report.results["phase1"].measurements
    phases = (m.forward_time_ms, m.backward_time_ms, m.communication_time_ms, m.optimizer_time_ms)
    assert all(phase > 0 for phase in phases) and sum(phases) == pytest.approx(m.total_time_ms)
    assert m.tokens_per_second == pytest.approx(2 * 8 / m.total_time_ms * 1e3)
    assert m.tokens_per_second_per_gpu == pytest.approx(m.tokens_per_second / 2) and m.scaling_efficiency > 0
    alone = report.model_copy(update={"environment": {k: v for k, v in report.environment.items() if k != "world_size"}})
    (difference,) = differences({"throughput": alone}, {"throughput": report})
    assert difference.reason == "world_size is 1 in OLD and 2 in NEW"


def test_an_estimate_for_a_rank_holds_the_gradients_all_through_the_step():
    case = MemoryCase(model_config("baseline", replace(TINY, vocab_size=40_000)), 1, 8)
    one, two = estimate_memory(case), estimate_memory(replace(case, ranks=2))
    gradients = 4 * one.parameters["total"]
    assert two.phase_bytes["forward"] - one.phase_bytes["forward"] == pytest.approx(gradients, rel=0.01)
    assert "2 ranks" in two.assumptions and "ranks" not in one.assumptions


@pytest.mark.parametrize("command", ["tables", "compare", "generate", "export", "pipeline", "doctor"])
def test_what_runs_in_one_process_says_so(command, monkeypatch, capsys, tmp_path):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main([command, *["a", "b"] * (command == "compare")]) == 2
    assert f"phase1 {command} runs in one process; got 2 of torchrun" in capsys.readouterr().err


def test_models_of_a_grid_train_side_by_side_as_they_would_alone(data, tmp_path, capfd):
    flags = dict(zip(("dataset_name", "tokenizer", "cache_dir"), data[1::2]))
    shape = {"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "ar_ssm_min_rank": 2, "ar_ssm_window": 4}
    shape |= {"htt_dense_rows": 4, "htt_groups": 10, "test_htt_ranks": (2,), "test_ar_ssm_ranks": (4,)}
    sizes = {"seq_length": 8, "train_tokens": 64, "train_batch_size": 4, "micro_batch_size": 4}
    run = PerplexityRun(**flags, **shape, **sizes, checkpoint_dir=str(tmp_path / "checkpoints"), out_dir=str(tmp_path / "out"))
    (corpus,) = perplexity.corpora_of(run, ("train", "valid"))
    trained_in_turn = list(train_side_by_side(run, candidates(run), corpus, ["0", "0"]))
    assert sorted(model.key for model in trained_in_turn) == sorted(model.key for model in candidates(run))
    folders = {model.key: training_of(run, model, corpus)[0] for model in candidates(run)}
    trained = {key: (folder / INDEX).read_bytes() for key, folder in folders.items()}
    assert all(json.loads(index)["facts"]["finished"] for index in trained.values()) and len(trained) == 2
    err = capfd.readouterr().err
    assert "[baseline] trains on GPU 0" in err and "[phase1_htt2_ar4] step 2/2 100 %" in err
    assert list(train_side_by_side(run, candidates(run), corpus, ["0"])) == candidates(run)  # nothing is left to train
    assert "trains on GPU" not in capfd.readouterr().err
    for model in candidates(run):
        train_model(run, model, corpus)
    assert trained == {key: (folder / INDEX).read_bytes() for key, folder in folders.items()}


MODELS = """
from torch import nn

class Right(nn.Module):
    def __init__(self, V):
        super().__init__()
        self.table = nn.Embedding(V, V)
        nn.init.zeros_(self.table.weight)

    def forward(self, ids):
        return self.table(ids)

class Wrong(Right):
    def forward(self, ids):
        return super().forward(ids) if not self.training else 1 / 0

def right(vocab_size):
    return Right(vocab_size)

def wrong(vocab_size):
    return Wrong(vocab_size)
"""


def test_models_of_ones_own_train_beside_the_others_and_one_that_fails_is_tried_where_it_is_asked_for(
    data, tmp_path, capfd, monkeypatch
):
    (tmp_path / "models_beside.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    flags = dict(zip(("dataset_name", "tokenizer", "cache_dir"), data[1::2]))
    sizes = {"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "htt_dense_rows": 4, "htt_groups": 10, "ar_ssm_min_rank": 2}
    sizes |= {"test_htt_ranks": (2,), "test_ar_ssm_ranks": (4,), "seq_length": 8, "train_tokens": 64, "train_batch_size": 4}
    own = ("one=models_beside:right", "two=models_beside:wrong")
    run = PerplexityRun(**flags, **sizes, micro_batch_size=4, engine=False, baseline=False, model=own, checkpoint_dir="beside")
    (corpus,) = perplexity.corpora_of(run, ("train", "valid"))
    models = {model.key: model for model in candidates(run)}
    assert {model.key for model in train_side_by_side(run, list(models.values()), corpus, ["0", "0"])} == {"one", "two"}
    err = capfd.readouterr().err
    assert "[one] is trained" in err and "[two] ended with exit status" in err and "division by zero" in err
    train_model(replace(run, checkpoint_dir="alone"), models["one"], corpus)
    (beside,), (alone,) = (list(tmp_path.glob(f"{place}/one-*/{INDEX}")) for place in ("beside", "alone"))
    weights = [load_model(index.parent, models["one"].config.model)[0].state_dict() for index in (beside, alone)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not list(tmp_path.glob(f"beside/two-*/{INDEX}"))


def test_models_that_a_journal_has_are_not_trained_again(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("phase1.measure.perplexity.side_by_side._start", lambda *_: pytest.fail("a training"))
    flags = dict(zip(("dataset_name", "tokenizer", "cache_dir"), data[1::2]))
    run = PerplexityRun(**flags, checkpoint_dir=str(tmp_path), d_model=16, n_heads=2, ar_ssm_min_rank=2, test_htt_ranks=(2,), test_ar_ssm_ranks=(4,))
    models = candidates(run)
    assert list(train_side_by_side(run, models, None, ["0"], done={model.key for model in models})) == models


@pytest.mark.parametrize(
    "gpus, words",
    [
        ("all", "--gpus all needs one process and the GPUs that it names; got 0 GPUs"),
        ("0 0", "--gpus 0 0 needs one process and the GPUs that it names; got 0 GPUs"),
        ("both", "--gpus must be all, or numbers of GPUs; got both"),
        ("-1", "--gpus"),
    ],
)
def test_gpus_must_be_there(data, tmp_path, capsys, gpus, words):
    command = f"perplexity {SHAPE} --test-ar-ssm-ranks 4 --test-htt-ranks 2 --gpus {gpus}".split()
    assert main([*command, *data, "--out-dir", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_shard_needs_several_gpus(data, tmp_path, capsys):
    assert main(["train", *f"{SHAPE} {RANKS} {TRAIN} --shard".split(), *data, "--out-dir", str(tmp_path)]) == 2
    assert "--shard needs several GPUs" in capsys.readouterr().err


def test_context_parallel_needs_several_gpus_that_share_a_sequence_evenly(data, tmp_path, capsys, monkeypatch):
    words = ["train", *f"{SHAPE} {RANKS} {TRAIN} --context-parallel".split(), *data, "--out-dir", str(tmp_path)]
    assert main(words) == 2
    assert "--context-parallel needs several GPUs; got one process" in capsys.readouterr().err
    monkeypatch.setattr(train.group, "size", lambda: 3)
    assert main(words) == 2
    assert "--seq-length must be a multiple of the 3 ranks; got 8; start 2, or change it" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--shard", "--piece-length 4", "--compile", "--cuda-graphs", "--mixer attention", "--model x=a:b"])
def test_context_parallel_says_what_it_cannot_do(other, capsys):
    assert main(["train", "--context-parallel", *other.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--context-parallel" in line and "; got " in line and "leave" in line


def test_two_ranks_share_every_sequence_and_train_and_score_as_one_process(data, tmp_path, capsys):
    """The whole command: a valid split is looked at on the way, and one process goes on from where two have stopped."""
    words = [*f"{SHAPE} {RANKS} {TRAIN} --train-tokens 640 --eval-every 10 --sample-every 20".split(), *data]
    assert main(["train", *words, "--out-dir", str(tmp_path / "one")]) in (0, 3)
    done = torchrun(2, "-m", "phase1", "train", *words, "--context-parallel", "--out-dir", tmp_path / "two")
    assert done.returncode == 0 and "each of 2 ranks takes 4 tokens of every sequence" in done.stderr, done.stderr
    one, two = (read_index(tmp_path / name) for name in ("one", "two"))
    assert two["model_config"] == one["model_config"] and two["train_config"] == one["train_config"]
    rows = [(tmp_path / name / METRICS).read_text().splitlines() for name in ("one", "two")]
    for alone, ours in zip(*(map(json.loads, lines) for lines in rows), strict=True):
        assert {"loss", "val_loss"} <= alone.keys()
        for name in ("step", "tokens", "loss", "val_loss", "grad_norm"):
            assert ours[name] == (alone[name] if alone[name] is None else pytest.approx(alone[name], rel=1e-5))


def test_rank_0_alone_estimates_what_a_gpu_has_to_hold(data, tmp_path):
    """An estimate takes a training step, in which it once waited for the other ranks, who do not estimate."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from phase1.cli import main\n"
        "from phase1.commands import train\n"
        "train.device_type, train.precision = lambda: 'cuda', lambda *_: 'fp16'\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [*f"train {SHAPE} {RANKS} {TRAIN} --train-tokens 64".split(), *data]
    done = torchrun(2, script, *words, "--out-dir", tmp_path / "out")
    assert done.returncode in (0, 1) and done.stderr.count("memory: ") == 1, done.stderr  # 1: it has learnt nothing
    assert read_index(tmp_path / "out")["facts"]["finished"]


def test_two_nodes_train_as_one_process(data, tmp_path):
    """Two torchruns that meet at a port of this machine, as those of two machines do, with a shared --out-dir."""
    words = [*f"{SHAPE} {RANKS} {TRAIN} --train-tokens 160".split(), *data]
    assert main(["train", *words, "--out-dir", str(tmp_path / "one")]) in (0, 3)
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", meeting]
    command = [*launch, "-m", "phase1", "train", *words, "--out-dir", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in "ab"
    ]
    try:
        said = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted("trained on 160 tokens" in out for out, _ in said) == [False, True]  # one of both nodes has rank 0
    losses = [{row["step"]: row["loss"] for row in read_metrics(tmp_path / name / METRICS)} for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 5
    one, two = (read_index(tmp_path / name) for name in ("one", "two"))
    assert two["facts"]["finished"] and two["train_config"] == one["train_config"]


def test_the_report_of_perplexity_is_that_of_one_process(data, tmp_path):
    """Also where the ranks are more than the batches, and could not have shared one of the training."""
    words = f"{SHAPE} --test-ar-ssm-ranks 4 --test-htt-ranks 2 {PERPLEXITY}".split()
    words += ["--checkpoint-dir", str(tmp_path / "checkpoints"), *data]
    assert main(["perplexity", *words, "--out-dir", str(tmp_path / "one")]) in (0, 1, 3)
    done = torchrun(3, "-m", "phase1", "perplexity", *words, "--out-dir", tmp_path / "two")
    one, two = (read_report(tmp_path / name / "phase1_perplexity_validation.json", "perplexity") for name in ("one", "two"))
    assert two.environment["world_size"] == 3, done.stderr
    contents = [report.model_dump(exclude={"environment": True, "command": True, "created_utc": True, "run": {"out_dir"}}) for report in (one, two)]
    assert contents[0] == contents[1] and contents[0]["run"]["batch_size"] == 8
    assert 2 < len(one.results["baseline"].window_nll_nats) <= 8


@pytest.mark.parametrize("page", ["docs/multi_gpu.md", "docs/ja/multi_gpu.md"])
def test_every_command_on_the_page_can_be_typed(page):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    known = 0
    for words in (shlex.split(line) for block in blocks for line in block.splitlines()):
        if words[0] == "torchrun":
            torch_run.get_args_parser().parse_args(words[1:])
            words = words[words.index("-m") + 1 :]
        if words[0] == "sbatch":
            assert "-m phase1 train" in (ROOT / words[1]).read_text()
            words = ["phase1", "train", *words[2:]]
        if words[0] == "phase1":
            parse(*words[1:2], words[2:])
            known += 1
    assert known > 8
