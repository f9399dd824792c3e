"""The commands of docs/multi_gpu.md on two GPUs, over NCCL, against one."""

import pytest
import torch

from phase1.records.metrics import METRICS, read_metrics
from phase1.records.schema import FILES, read_report
from phase1.training.checkpoint import read_index
from tests.parallel.test_ranks import started, torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
SHAPE = "--vocab-size 512 --d-model 128 --n-layers 2 --n-heads 4 --htt-dense-rows 64 --htt-groups 64 --ar-ssm-window 16"
DATA = "--dataset-name builtin --tokenizer bpe"
TRAIN = f"--seq-length 128 --train-tokens {30 * 16 * 128} --train-batch-size 16 --micro-batch-size 8 --eval-every 15"
NOISE = 0.02  # of losses in FP16: kernels add up in other orders


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A training on one GPU."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    done = started("-m", "phase1", "train", *f"{SHAPE} {DATA} {TRAIN}".split(), "--out-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder / METRICS)}


@pytest.mark.parametrize("flags", ["", "--cuda-graphs", "--compile --cuda-graphs", "--shard", "--context-parallel", "--recompute none"])
def test_a_training_on_two_gpus_has_the_losses_of_one(alone, tmp_path, flags):
    words = f"{SHAPE} {DATA} {TRAIN} {flags}".split()
    done = torchrun(2, "-m", "phase1", "train", *words, "--out-dir", tmp_path)
    assert done.returncode == 0 and done.stderr.count("memory: ") == 1, done.stderr
    assert read_index(tmp_path)["facts"]["finished"]
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=NOISE)


def test_scores_are_those_of_one_gpu_bit_for_bit(alone, tmp_path):
    words = ["-m", "phase1", "perplexity", *f"{DATA} --vocab-size 512 --seq-length 128 --max-samples 20".split(), "--checkpoint", alone]
    for launch, name in ((started, "one"), (lambda *command: torchrun(2, *command), "two")):
        done = launch(*words, "--out-dir", tmp_path / name)
        assert done.returncode in (0, 3), done.stderr
    one, two = (read_report(tmp_path / name / FILES["perplexity"], "perplexity").results for name in ("one", "two"))
    assert {key: result.window_nll_nats for key, result in one.items()} == {key: r.window_nll_nats for key, r in two.items()}


def test_models_of_a_grid_train_one_on_each_gpu(tmp_path):
    words = f"{SHAPE} {DATA} {TRAIN} --test-htt-ranks 16 --test-ar-ssm-ranks 16 --max-samples 20 --gpus all".replace("--eval-every 15", "").split()
    done = started("-m", "phase1", "perplexity", *words, "--checkpoint-dir", tmp_path / "c", "--out-dir", tmp_path)
    assert done.returncode in (0, 1, 3), done.stderr
    results = read_report(tmp_path / FILES["perplexity"], "perplexity").results
    assert all(result.status == "ok" and result.trained_tokens == 30 * 16 * 128 for result in results.values()) and len(results) == 2


def test_throughput_and_memory_of_two_gpus(tmp_path):
    words = f"{SHAPE} --batch-size 2 --no-baseline --out-dir {tmp_path}".split()
    speed = torchrun(2, "-m", "phase1", "throughput", *words, *["--seq-lengths", "128", "--warmup-steps", "2", "--measure-steps", "5", "--no-saturate"])
    assert speed.returncode == 0, speed.stderr
    memory = torchrun(2, "-m", "phase1", "memory", *words, "--seq-length", "128")
    assert memory.returncode in (0, 1), memory.stderr
    throughput, peaks = (read_report(tmp_path / FILES[kind], kind) for kind in ("throughput", "memory"))
    for report in (throughput, peaks):
        assert (report.environment["world_size"], report.environment["backend"]) == (2, "nccl")
    for result in throughput.results.values():
        (m,) = result.measurements
        assert m.status == "ok" and m.communication_time_ms > 0 and m.scaling_efficiency > 0 and len(m.peak_by_rank_bytes) == 2
    assert peaks.results["phase1"].basis == "measured" and len(peaks.results["phase1"].peak_by_rank_bytes) == 2
