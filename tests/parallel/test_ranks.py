"""A run of 2 and of 4 processes against one; what the ranks do is in worker.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phase1.config import TrainConfig
from phase1.training.checkpoint import load_model, read_index
from phase1.training.step import stretch_per_rank, windows_per_rank
from tests.parallel import worker

ROOT = Path(__file__).parents[2]


def torchrun(ranks, *command, **options):
    return started("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command, **options)


def started(*command, **options):
    """Python, with one thread for each process."""
    launch = [sys.executable, *map(str, command)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        launch, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what 2 ranks did, then 4, of jobs that one process had begun or that it ends afterwards."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.job(folder / "whole")
    for name in ("from one", "from one, sharded", "from one, context"):
        assert worker.job(folder / name, stop=worker.PAUSE) == "paused"
    assert worker.job(folder / "from one, to one", stop=worker.PAUSE - 1) == "paused"
    done = started(ROOT / "tests" / "parallel" / "worker.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("to one", "from one, to one", "sharded, to one", "context, to one"):
        assert worker.job(folder / name) == "finished"
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def found(request, folder):
    return json.loads((folder / f"{request.param}.json").read_text()) | {"ranks": request.param}


def assert_equal(ours, alone):
    """Losses and norms of gradients, but for the order of sums."""
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, alone, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)  # which is summed up in float32
        assert norm == pytest.approx(expected_norm, rel=1e-9)


def test_losses_and_gradient_norms_are_those_of_one_process(found):
    """Of 20 steps, of engine and baseline, in micro-batches of 1 and 2."""
    assert len(found["losses"]) == 4
    for name, ours in found["losses"].items():
        role, micro = name.split()
        assert len(ours) == 20
        assert_equal(ours, worker.losses(role, int(micro), steps=20))


def test_gradients_weigh_by_the_scored_targets_of_all_ranks(found):
    assert found["uneven"] == pytest.approx(worker.uneven_gradients(), rel=1e-4)


@pytest.mark.parametrize("name", ["overflow", "sharded overflow", "context overflow"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(found, name):
    for scale, stayed, moved in found.get(name, []):
        assert (scale, stayed, moved) == (4.0, True, True)
    assert name in found or (name, found["ranks"]) == ("sharded overflow", 4)


@pytest.mark.parametrize("name", ["scores", "sharded scores"])
def test_scores_are_those_of_one_process_bit_for_bit(found, name):
    """Also of one window: the other ranks have none."""
    (alone,) = worker.scores()
    assert found.get(name, [alone] * 4) == [alone] * found["ranks"]


def test_a_failure_on_one_rank_is_one_on_all_and_the_next_call_works(found):
    assert found["failures"] == [["oom", "ok", "oom", "ok"]] * found["ranks"]


def test_processes_that_ranks_start_compute_together_and_end_together(folder):
    well, ill = json.loads((folder / "2.json").read_text())["children"]
    assert well == [["ok", 3]] * 2 and ill == [["error", None], ["oom", None]]


def test_a_step_lasts_as_long_as_on_the_slowest_rank(found):
    assert found["times"] == [2.0 + found["ranks"], 7.0] and found["first"] == 0


def test_only_rank_0_writes(found):
    assert found["written by others"] == []


def test_sharded_losses_are_those_of_one_process(folder):
    ours = json.loads((folder / "2.json").read_text())["sharded losses"]
    assert_equal(ours, worker.losses())


def test_losses_of_sequences_that_ranks_share_are_those_of_one_process(found):
    assert_equal(found["context losses"], worker.losses())


def test_losses_with_muon_are_those_of_one_process(found):
    """Also of shards."""
    assert len(found["muon losses"]) == (2 if found["ranks"] == 2 else 1)
    for ours in found["muon losses"]:
        assert_equal(ours, worker.losses(optimizer="muon"))


CONTINUED = [
    "from one", "to one", "from one, to one", "to four", "sharded, to one", "from one, sharded", "context, to one", "context, to four",
    "from one, context",
]


@pytest.mark.parametrize("name", CONTINUED)
def test_a_training_goes_on_with_another_number_of_ranks(folder, name):
    whole, index = read_index(folder / "whole"), read_index(folder / name)
    assert index["facts"]["finished"] and index["step"] == worker.JOB_STEPS
    assert index["facts"]["loss"] == pytest.approx(whole["facts"]["loss"], rel=1e-5)
    assert index["train_config"] == whole["train_config"] and index["model_config"] == whole["model_config"]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    ours = {row["step"]: row["loss"] for row in rows}
    alone = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, worker.JOB_STEPS + 1))  # every step once
    for row in alone:
        assert ours[row["step"]] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("name", CONTINUED)
def test_its_parameters_are_those_of_one_process(folder, name):
    whole, ours = (load_model(folder / run)[0].state_dict() for run in ("whole", name))
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_a_training_that_pauses_twice_has_a_session_for_each_number_of_ranks(folder):
    rows = [json.loads(line) for line in (folder / "from one, to one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["session"] for row in rows] == [1, 1, 2, 2, 3, 3]


def test_two_runs_of_the_same_ranks_are_equal_bit_for_bit(folder):
    first, second = json.loads((folder / "2.json").read_text())["equal runs"]
    assert first == second


def test_jobs_ended_as_they_should(folder):
    jobs = json.loads((folder / "2.json").read_text())["jobs"]
    paused = {name for name in CONTINUED if "to" in name.split()}
    assert set(jobs) == set(CONTINUED)
    assert jobs == {name: "paused" if name in paused else "finished" for name in jobs}


@pytest.mark.parametrize("ranks, batch, micro, expected", [(2, 8, 2, 4), (4, 8, 8, 2), (1, 8, 8, 8), (8, 8, 1, 1)])
def test_ranks_share_a_batch(ranks, batch, micro, expected):
    assert windows_per_rank(TrainConfig(train_batch_size=batch, micro_batch_size=micro), ranks) == expected


@pytest.mark.parametrize("ranks, batch, micro", [(3, 8, 2), (16, 8, 2), (2, 12, 4)])
def test_ranks_that_cannot_share_a_batch_are_refused(ranks, batch, micro):
    with pytest.raises(ValueError, match=r"must .*; got \d+; (start \d|give)"):
        windows_per_rank(TrainConfig(train_batch_size=batch, micro_batch_size=micro), ranks)


def test_a_finished_training_is_returned_to_any_number_of_ranks(folder, monkeypatch):
    monkeypatch.setattr("phase1.training.job.group.size", lambda: 3)
    assert worker.job(folder / "whole") == "finished"
    with pytest.raises(ValueError, match="--train-batch-size must be a multiple of the 3 ranks; got 8; start 2, or change it"):
        worker.job(folder / "new")


def test_ranks_share_sequences_evenly_or_are_refused():
    assert stretch_per_rank(12, 4) == 3
    with pytest.raises(ValueError, match="--seq-length must be a multiple of the 4 ranks; got 10; start 2, or change it"):
        stretch_per_rank(10, 4)
