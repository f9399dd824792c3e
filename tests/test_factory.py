"""What goes wrong with a model of a user's own, before anything is measured: one line that says where."""

import sys

import pytest
import torch

from phase1.cli import main
from phase1.config import ModelConfig, TrainConfig
from phase1.factory import pinned, split
from phase1.records.schema import read_report
from phase1.roster import OWN, own_models
from phase1.runs import MemoryRun, PerplexityRun, ThroughputRun, TrainRun
from phase1.trainable import build
from phase1.training.checkpoint import load_model, save_checkpoint
from phase1.training.optimizers import described_groups
from phase1.training.step import make_train_state

SOURCE = """
import torch
from torch import nn

NUMBER = 3


class Model(nn.Module):
    def __init__(self, V):
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, ids):
        return self.table(ids)


def right(vocab_size):
    return Model(vocab_size)


def raises(vocab_size):
    return 1 / 0


def nothing(vocab_size):
    return None


def no_forward():
    return nn.Module()


def no_parameters():
    return nn.Identity()


def too_much(vocab_size, depth):
    return Model(vocab_size)


class ReadsNumbers(Model):
    def forward(self, ids):
        logits = super().forward(ids)
        return logits * (1 + 0 * float(logits.detach().numpy().max()))


def reads_numbers(vocab_size):
    return ReadsNumbers(vocab_size)


def wrong_shape(vocab_size):
    return Model(vocab_size + 1)


def other_config(config):
    from dataclasses import replace

    from phase1.model import LanguageModel

    return LanguageModel(replace(config, n_layers=config.n_layers + 1, model=None))
"""
SIZES = {"vocab_size": 20, "d_model": 8, "n_layers": 1, "n_heads": 2, "htt_rank": 1, "ar_ssm_max_rank": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "users_module.py").write_text(SOURCE)
    (tmp_path / "users_broken.py").write_text("import torch\nimport no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("users_module", "users_broken"):
        sys.modules.pop(name, None)


def config(name):
    return ModelConfig(**(OWN | SIZES | {"model": pinned(f"users_module:{name}")}))


def test_a_reference_has_a_name_and_the_hash_of_its_source(folder):
    assert split("gpt=my_pack.models:build") == ("gpt", "my_pack.models:build")
    assert split("my_pack.models:Build") == ("build", "my_pack.models:Build")
    before = pinned("users_module:right")
    assert before == pinned(before) and before.startswith("users_module:right@") and len(before.partition("@")[2]) == 12
    (folder / "users_module.py").write_text(SOURCE + "# changed\n")
    assert pinned("users_module:right") != before
    with pytest.raises(ValueError, match="has changed"):
        pinned(before)


@pytest.mark.parametrize("text", ["", "module", "Name=module:f", "a=b=c:d", "module:", "module:f()", "os:system rm", "a/b:c"])
def test_other_spellings_are_refused(text):
    with pytest.raises(ValueError, match="--model must be"):
        split(text)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("no_such_module:f", "no module no_such_module"),
        ("no_such.package.module:f", "must be importable"),
        ("users_broken:f", r"No module named 'no_such_package' \(users_broken.py, line 2\)"),
        ("__main__:f", "define it in a module"),
        ("users_module:rigth", "no such name; it has right, raises"),
        ("users_module:NUMBER", "a int"),
        ("users_module:raises", r"the factory raised ZeroDivisionError: division by zero \(users_module.py, line 22\)"),
        ("users_module:nothing", "must return a torch.nn.Module .*; got a NoneType"),
        ("users_module:no_forward", "without them"),
        ("users_module:no_parameters", "require gradients; got none"),
        ("users_module:too_much", "got depth too; give it a default"),
        ("users_module:other_config", "must be of the factory's config"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_line(folder, reference, says, capsys):
    assert main(["memory", "--vocab-size", "20", "--d-model", "8", "--n-heads", "2", "--n-layers", "1", "--htt-rank", "1",
                 "--ar-ssm-max-rank", "4", "--htt-dense-rows", "2", "--htt-groups", "4", "--model", f"mine={reference}"]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("phase1 memory: error: --model ")
    import re

    assert re.search(says, error), error


def test_a_model_that_cannot_run_without_contents_has_no_estimate_but_a_reason(folder):
    assert main(["memory", "--vocab-size", "20", "--d-model", "8", "--n-heads", "2", "--n-layers", "1", "--htt-rank", "1",
                 "--ar-ssm-max-rank", "4", "--htt-dense-rows", "2", "--htt-groups", "4", "--batch-size", "1", "--seq-length", "4",
                 "--no-baseline", "--dry-run", "--model", "right=users_module:right", "users_module:reads_numbers"]) in (1, 3)  # fmt: skip
    results = read_report("results/benchmarks/phase1_memory_validation.json", "memory").results
    assert results["right"].status == "ok" and results["reads_numbers"].status == "error"
    assert "numpy" in results["reads_numbers"].detail and results["reads_numbers"].peak_allocated_bytes is None


def test_a_model_that_returns_other_logits_says_so_when_it_runs(folder):
    with pytest.raises(ValueError, match=r"forward must return logits \(1, 3, 20\).*got \(1, 3, 21\)"):
        build(config("wrong_shape"))(torch.zeros(1, 3, dtype=torch.int64))


def test_names_that_mean_something_else_or_come_twice_are_refused(folder):
    shape = MemoryRun(**{name: value for name, value in SIZES.items()}, htt_dense_rows=2, htt_groups=4)
    for names, taken in (
        (("no_copy=users_module:right",), ("no_copy",)),
        (("a=users_module:right", "a=users_module:right"), ()),
    ):
        with pytest.raises(ValueError, match="names of its own"):
            own_models(names, shape, taken)
    with pytest.raises(ValueError, match="leave one of them out"):
        MemoryRun(model=("phase1=users_module:right",), ablate=True)
    with pytest.raises(ValueError, match="leave one of them out"):
        ThroughputRun(model=("baseline=users_module:right",), decode=True)
    with pytest.raises(ValueError, match="leave one of them out"):
        TrainRun(model="users_module:right", sample_every=5)
    with pytest.raises(ValueError, match="leave no model"):
        PerplexityRun(engine=False, baseline=False)


def test_a_checkpoint_decides_nothing_about_code(folder):
    """It is loaded for the very model that the command line names, and for no other."""
    own = config("right")
    state = make_train_state(build(own), TrainConfig(train_tokens=10, train_batch_size=1, micro_batch_size=1), "cpu")
    save_checkpoint(folder / "checkpoint", state, {}, resumable=False)
    loaded, _ = load_model(folder / "checkpoint", own.model)
    assert torch.equal(loaded.model.table.weight, state.model.model.table.weight)
    sys.modules.pop("users_module")
    for other in (None, "users_module:raises@000000000000"):
        with pytest.raises(ValueError, match="users_module:right@"):
            load_model(folder / "checkpoint", other)
    assert "users_module" not in sys.modules


def test_tables_of_a_users_model_learn_at_their_own_rate(folder):
    state = make_train_state(build(config("right")), TrainConfig(), "cpu")
    sizes = [sum(p.numel() for p in group["params"]) for group in state.optimizer.param_groups]
    assert sizes == [0, 0, 400, 0]  # of Muon, then of AdamW: matrices, tables, the rest
    assert described_groups(state.model) == "0 parameters of matrices, which decay, 400 of tables, at their own rate, 0 of the rest"


def test_two_models_of_one_source_and_size_have_one_id_and_others_another(folder):
    assert config("right").config_id == config("right").config_id
    assert config("right").config_id != config("wrong_shape").config_id
