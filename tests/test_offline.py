"""`--offline` opens no socket, whatever data set is asked for."""

import json
import os
import subprocess
import sys

import pytest

from phase1.commands import pipeline
from phase1.runs import PipelineRun
from tests.data.test_hub import CARD, COMMIT, downloaded, json_lines

# argv: a JSON list of command lines. Prints [exit statuses, sockets that were asked for] as JSON on the last line.
WITHOUT_SOCKETS = """
import json, socket, sys

asked = []

class NoSocket(socket.socket):
    def __init__(self, *args, **options):
        asked.append("socket")
        raise OSError("a socket was asked for")

def no_name(*args, **options):
    asked.append("name")
    raise OSError("a name was asked for")

socket.socket = NoSocket
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = no_name

from phase1.cli import main

statuses = [main(line) for line in json.loads(sys.argv[1])]
print(json.dumps([statuses, asked]))
"""
TINY = [
    "--vocab-size",
    "300",
    "--d-model",
    "16",
    "--n-layers",
    "1",
    "--n-heads",
    "2",
    "--ar-ssm-min-rank",
    "2",
    "--ar-ssm-window",
    "4",
    "--htt-dense-rows",
    "4",
    "--htt-groups",
    "10",
    "--seq-length",
    "16",
    "--train-tokens",
    "64",
    "--train-batch-size",
    "4",
    "--micro-batch-size",
    "4",
]


@pytest.fixture
def program(tmp_path):
    """Run command lines in one process without sockets: (exit statuses, sockets asked for, lines on stderr)."""

    def run(*lines):
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", WITHOUT_SOCKETS, json.dumps([list(map(str, line)) for line in lines])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return *json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()

    return run


def test_offline_evaluates_local_and_cached_data_and_opens_no_socket(program, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text("the cat sees the dog . a dog sees the cat .\n" * 40)
    texts = json_lines(["the cat sees the dog . " * 20] * 40)
    files = {"en/train-0.json": texts, "en/validation-0.json": texts}
    downloaded(tmp_path / "hf" / "hub", "allenai/c4", CARD.format(config="en", train=40), files)
    common = ["--offline", "--tokenizer", "bpe", *TINY, "--cache-dir", tmp_path / "cache"]
    evaluation = ["perplexity", *common, "--max-samples", 2, "--test-htt-ranks", 2, "--test-ar-ssm-ranks", 4, "--no-baseline"]
    evaluation += ["--checkpoint-dir", tmp_path / "checkpoints"]
    statuses, asked, errors = program(
        [*evaluation, "--dataset-name", "builtin", "--out-dir", tmp_path / "a"],
        [*evaluation, "--dataset-name", folder, "--out-dir", tmp_path / "b"],
        [*evaluation, "--dataset-name", "c4", "--dataset-config", "en", "--out-dir", tmp_path / "c"],
        ["train", *common, "--dataset-name", folder, "--htt-rank", 2, "--ar-ssm-max-rank", 4, "--out-dir", tmp_path / "d"],
    )
    assert (statuses, asked) == ([3, 3, 3, 0], []), errors  # 3: one model is compared with nothing
    report = json.loads((tmp_path / "c" / "phase1_perplexity_validation.json").read_text())
    assert report["run"]["dataset_revision"] == COMMIT


def test_offline_without_a_copy_is_one_line_and_exit_3(program, tmp_path):
    line = ["perplexity", "--offline", "--out-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--dataset-name"]
    names = (["wikitext"], ["c4", "--dataset-config", "en"], ["someone/something"])
    statuses, asked, errors = program(*([*line, *name] for name in names))
    assert (statuses, asked) == ([3, 3, 3], [])
    assert len(errors) == 3
    assert all("--offline, and it is not in the local cache; download it first" in error for error in errors)
    assert not (tmp_path / "out").exists()


def test_without_offline_the_network_is_asked(program, tmp_path):
    statuses, asked, errors = program(["perplexity", "--dataset-name", "wikitext", "--out-dir", tmp_path / "out"])
    assert statuses == [3] and asked and len(errors) == 1


def test_the_pipeline_hands_the_flag_on():
    for offline in (True, False):
        steps = dict(pipeline.steps(PipelineRun(preset="smoke", offline=offline)))
        assert steps["perplexity"].offline == offline
