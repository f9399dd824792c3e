"""The recipes of CONTRIBUTING.md, applied as they are written to a copy of the project: what they promise then holds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TEXT, re.MULTILINE | re.DOTALL))
CHECKS = {
    "A mixer": """
from dataclasses import replace
from phase1.measure.perplexity import candidates
from phase1.tables.screen import model_title
model = LanguageModel(replace(small, mixer="running_mean"))
whole = model(ids)
first, states = model.continue_from(ids[:, :3], None)
second, _ = model.continue_from(ids[:, 3:], states)
torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
changed = ids.clone(); changed[:, -1] += 1
assert torch.equal(model(changed)[:, :-1], whole[:, :-1])
learns(model)
assert parse("train", ["--mixer", "running_mean"]).mixer == "running_mean"
for table in ("htt", "dense"):
    config, name = replace(small, mixer="running_mean", embedding=table), f"running_mean_{table}"
    assert str(Key.of(config)) == name and Key.parse(name) == Key.of(config) and not Key.of(config).is_engine
    assert model_title(name + "_seed1") == f"running mean {table}, seed 1"
    candidates.read_index, candidates.model_config_of = lambda path: {"train_config": {}}, lambda index: config
    (given,) = candidates.candidates(parse("perplexity", ["--checkpoint", f"{name}=folder"]))  # as the screen of train says
    assert given.key == name
""",
    "A token table": """
model = LanguageModel(replace(small, embedding="low_rank"))
assert model.parameter_counts()["embedding"] == 40 * 2 + 2 * 16
learns(model)
assert parse("train", ["--embedding", "low_rank"]).embedding == "low_rank"
for mixer in ("ar_ssm", "attention"):
    key = Key.of(replace(small, mixer=mixer, embedding="low_rank"))
    assert str(key) == f"{mixer}_low_rank" and Key.parse(str(key)) == key
""",
    "A rival": """
from phase1.measure.perplexity.candidates import candidates
run = parse("perplexity", ["--variants", "transformer_gate"])
found = {c.key: c.config for c in candidates(run)}
assert found["transformer_gate"].attention_gate and str(Key.of(found["transformer_gate"])) == "transformer_gate"
""",
    "A card": """
from phase1.machine.cards import card_for
assert card_for("RTX 5060 Laptop GPU").key == "rtx5060-laptop" == parse("memory", ["--card", "rtx5060-laptop"]).card
""",
    "A metric": """
from phase1.measure.throughput.interleaved import measure_throughput  # it imports
from phase1.records.schema import Measurement, read_report
from phase1.tables.throughput import throughput_comparison
report = read_report(sys.argv[1], "throughput")  # older: without the field
table = throughput_comparison(report)
column = [c.title for c in table.columns].index("Per token")
assert all(row[column] is None for row in table.rows)
import reference
assert "microseconds_per_token" in reference.page("en") and "microseconds_per_token" in reference.page("ja")
""",
}
BEGIN = """
import sys
from dataclasses import replace
import torch
from phase1.cli import parse
from phase1.config import ModelConfig
from phase1.model import LanguageModel
from phase1.roster import Key
torch.manual_seed(0)
ids = torch.randint(39, (2, 7))
small = ModelConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
                    htt_rank=2, htt_dense_rows=4, htt_groups=10)
def learns(model):
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
"""


def blocks(recipe):
    """(file, kind of block, its text), in order; a block without a name of its own is of the file of the block before."""
    file = None
    for name, kind, text in re.findall(r"^(?:`([\w/.]+)`:\n\n)?```(python|diff)\n(.*?)^```$", recipe, re.MULTILINE | re.DOTALL):
        file = name or file
        yield file, kind, text


def apply(root, recipe):
    """Do what the recipe says to the project at `root`."""
    for file, kind, text in blocks(recipe):
        path = root / file
        if kind == "python":
            assert not path.exists(), f"{file} is there already"
            path.write_text(text)
            continue
        lines = text.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        content = path.read_text()
        assert content.count(old) == 1, f"{file} must have these lines once; correct the recipe:\n{old}"
        path.write_text(content.replace(old, new))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with every recipe applied, and what the checks of all recipes printed, by recipe."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", root / "docs")
    for recipe in RECIPES.values():
        apply(root, recipe)
    script = BEGIN + "".join(
        f"try:\n{''.join(f'    {line}' + chr(10) for line in check.splitlines())}    print({name!r})\n"
        f"except Exception as error:\n    print('failed', {name!r}, repr(error))\n"
        for name, check in CHECKS.items()
    )
    record = ROOT / "results/h200/phase1_throughput_benchmark.json"
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'docs'}"}
    result = subprocess.run([sys.executable, "-c", script, record], capture_output=True, text=True, env=environment, cwd=root)
    return root, result.stdout.splitlines(), result.stderr


def test_every_recipe_has_a_check():
    assert set(RECIPES) == set(CHECKS)
    assert all(list(blocks(recipe)) for recipe in RECIPES.values())


@pytest.mark.parametrize("name", CHECKS)
def test_a_recipe_does_what_it_says(name, project):
    _, printed, errors = project
    assert name in printed, [line for line in printed if line.startswith(f"failed {name}")] or errors


def test_what_the_recipes_add_is_as_clean_as_the_rest(project):
    root = project[0]
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", root / "src"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
