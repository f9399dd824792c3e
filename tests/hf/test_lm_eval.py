"""lm-eval's own command on an exported model, against `phase1 perplexity` on the same text."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

import phase1.hf  # noqa: F401, registers the model
from phase1.cli import main
from phase1.lm_eval import Phase1LM
from tests.generation.test_decoder import SHAPE, checkpoint  # noqa: F401, a fixture

ROOT = Path(__file__).parents[2]
T, WINDOWS = 48, 5  # of the evaluation; the training was shorter
WORDS = "north in seven a mariners while lazy ancient towards of the world island unknown brown é 日本 "
TEXT = (WORDS * 3).encode()[: T * WINDOWS].decode("utf-8", "ignore")
TEXT += "." * (T * WINDOWS - len(TEXT.encode()))  # one token a byte: all windows are full
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list: [{{metric: {metric}}}]
{more}
metadata: {{version: 1.0}}
"""
PROMPTS = ["north", "in seven a mariners", "the", "unknown brown world of the"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("lm_eval")


@pytest.fixture
def folder(checkpoint, work):  # noqa: F811
    assert main(["export", "--checkpoint", str(checkpoint), "--out-dir", str(work / "model")]) == 0
    (work / "text.jsonl").write_text(json.dumps({"page": TEXT}) + "\n")
    (work / "prompts.jsonl").write_text("".join(json.dumps({"page": p}) + "\n" for p in PROMPTS))
    tasks = work / "tasks"
    tasks.mkdir(exist_ok=True)
    fields = {"name": "whole", "data": work / "text.jsonl", "kind": "loglikelihood_rolling", "text": "", "target": "{{page}}"}
    (tasks / "whole.yaml").write_text(TASK.format(**fields, metric="byte_perplexity", more=""))
    fields = {"name": "said", "data": work / "prompts.jsonl", "kind": "generate_until", "text": "{{page}}", "target": "x"}
    until = 'generation_kwargs: {max_gen_toks: 6, do_sample: false, until: ["\\n\\n\\n"]}'
    (tasks / "said.yaml").write_text(TASK.format(**fields, metric="exact_match", more=until))
    return work / "model"


def lm_eval(work, folder):
    """The results and samples of lm-eval's own command, without a network."""
    out = work / "out"
    command = [
        sys.executable, "-m", "phase1.lm_eval", "run", "--model", "phase1", "--model_args", f"pretrained={folder},dtype=float32,max_length={T}",
        "--tasks", "whole,said", "--include_path", str(work / "tasks"), "--batch_size", "4", "--device", "cpu",
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)]), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {
        name: [json.loads(line) for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in ("whole", "said")
    }
    return json.loads(results.read_text())["results"]["whole"]["byte_perplexity,none"], samples


def test_lm_eval_scores_an_export_as_phase1_perplexity_scores_the_checkpoint(work, folder, checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    data = work / "data"
    data.mkdir()
    (data / "valid.txt").write_text(TEXT)
    evaluation = ["perplexity", "--dataset-name", str(data), "--tokenizer", str(folder), "--seq-length", str(T)]
    evaluation += ["--vocab-size", str(SHAPE.vocab_size), "--max-samples", str(WINDOWS), "--batch-size", "4"]
    main([*evaluation, "--checkpoint", f"phase1_htt2_ar8={checkpoint}", "--out-dir", str(work / "p"), "--cache-dir", str(work / "c")])
    (result,) = json.loads((work / "p" / "phase1_perplexity_validation.json").read_text())["results"].values()
    assert result["token_count"] == T * WINDOWS == result["byte_count"], result["detail"]
    nats = sum(result["window_nll_nats"])
    byte_perplexity, samples = lm_eval(work, folder)
    (logged,) = samples["whole"]
    assert -float(logged["filtered_resps"][0]) == pytest.approx(nats, rel=1e-9)
    assert math.log(byte_perplexity) * T * WINDOWS == pytest.approx(nats, rel=1e-9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    said = {row["doc"]["page"]: row["resps"][0][0] for row in samples["said"]}  # four prompts in a batch, padded on the left
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert said[prompt] == tokenizer.decode(alone, skip_special_tokens=True), prompt
    assert len(set(said.values())) > 1


def test_log_likelihoods_do_not_depend_on_the_size_of_a_batch(folder, monkeypatch):
    """Requests of other lengths are padded on the right in lm-eval's own batches, and never in those of whole texts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pairs = [(a, b) for a in ("", "north", "in seven a mariners", "the") for b in (" of", " unknown brown world", " the lazy dog .")]
    texts = [TEXT[:n] for n in (T - 7, 2 * T, 3 * T + 5, 1)]
    found = []
    for size in (1, 4):
        model = Phase1LM(pretrained=str(folder), dtype="float64", max_length=T, batch_size=size, device="cpu")
        scored = model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
        whole = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)])
        found.append(([nats for nats, _ in scored], [greedy for _, greedy in scored], whole))
    one, four = found
    assert four[0] == pytest.approx(one[0], rel=1e-9) and four[1] == one[1] and four[2] == pytest.approx(one[2], rel=1e-9)
    assert len(set(one[0])) == len(pairs) and all(nats < 0 for nats in (*one[0], *one[2]))
