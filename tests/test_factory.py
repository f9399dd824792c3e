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


def exits(vocab_size):
    raise SystemExit(0)


class LossAlone(Model):
    forward = None

    def loss(self, ids, targets):
        return self.table.weight.sum()


def loss_alone(vocab_size):
    return LossAlone(vocab_size)


class ExitsInForward(Model):
    def forward(self, ids):
        raise SystemExit(0)


def exits_in_forward(vocab_size):
    return ExitsInForward(vocab_size)


class LeavesByGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise SystemExit(0)


class ExitsInBackward(Model):
    def forward(self, ids):
        return LeavesByGradient.apply(super().forward(ids))


def exits_in_backward(vocab_size):
    return ExitsInBackward(vocab_size)


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
    (tmp_path / "users_exit.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "__init__.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "users_package" / "models.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("users_module", "users_broken", "users_exit", "users_package"):
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
        ("users_module:rigth", "no such name; it has right, \\w+, \\w+ and \\d+ more"),
        ("users_module:NUMBER", "a int"),
        ("users_module:raises", r"the factory raised ZeroDivisionError: division by zero \(users_module.py, line 22\)"),
        ("users_module:exits", r"the factory raised SystemExit: 0 \(users_module.py, line \d+\)"),
        ("users_exit:f", r"importing users_exit raised SystemExit: SystemExit \(users_exit.py, line 2\)"),
        ("users_package.models:f", r"users_package.models must be importable; got SystemExit: SystemExit \(__init__.py, line 2\)"),
        ("users_module:loss_alone", r"must have forward, or loss and nll; got loss alone; .* \(users_module.py, line \d+\)"),
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


@pytest.mark.parametrize(
    ("reference", "status", "says"),
    [
        ("users_module:rigth", 2, "no such name; it has right"),
        ("x=users_module:torch", 2, "got a module"),
        ("no_such_module:f", 2, "no module no_such_module"),
        ("no_such.package.module:f", 2, "must be importable"),
        ("users_module:exits", 1, "SystemExit: 0 (users_module.py"),
        ("users_module:raises", 1, "ZeroDivisionError"),
        ("users_module:too_much", 1, "got depth too"),
        ("users_module:loss_alone", 1, "got loss alone"),
        ("users_module:exits_in_forward", 1, "SystemExit: 0 (users_module.py"),
        ("users_exit:f", 1, "SystemExit"),
        ("users_broken:f", 1, "(users_broken.py, line 2)"),
        ("users_package.models:f", 1, "SystemExit"),
    ],
)
def test_a_name_of_nothing_is_wrong_input_and_a_fault_of_the_module_an_answer(folder, reference, status, says, capsys):
    assert main(["check-model", "--vocab-size", "20", "--d-model", "8", "--n-heads", "2", reference]) == status
    out, error = capsys.readouterr()
    assert says in (error if status == 2 else out) and bool(error) == (status == 2)
    lines = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert len(lines) == (status == 1) and ("answer  no" in out) == (status == 1)


def test_a_misspelt_name_gets_the_nearest_and_not_all(folder):
    (folder / "users_module.py").write_text(SOURCE + "".join(f"def model_{i}():\n    pass\n" for i in range(28)))
    with pytest.raises(ValueError, match=r"it has right, \w+, \w+ and 3\d more"):
        build(ModelConfig(**(OWN | SIZES | {"model": "users_module:rihgt"})))


def test_an_interrupt_is_no_fault_of_the_model(folder, monkeypatch):
    model = build(config("right"))
    monkeypatch.setattr(type(model.model), "forward", lambda self, ids: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(torch.zeros(1, 3, dtype=torch.int64))
    (folder / "users_interrupted.py").write_text("def made(vocab_size):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        build(ModelConfig(**(OWN | SIZES | {"model": "users_interrupted:made"})))
    sys.modules.pop("users_interrupted", None)


@pytest.mark.parametrize("reference", ["users_module:exits_in_forward", "users_module:exits", "users_module:exits_in_backward"])
def test_no_command_ends_without_a_word_where_the_model_exits(folder, reference, capsys):
    (folder / "text").mkdir()
    for name in ("train", "valid"):
        (folder / "text" / f"{name}.txt").write_text("the cat sees the dog .\n" * 60)
    sizes = ["--vocab-size", "300", "--d-model", "8", "--n-heads", "2", "--n-layers", "1", "--htt-dense-rows", "2", "--htt-groups", "9"]
    sizes += ["--dataset-name", "text", "--tokenizer", "bpe", "--cache-dir", "cache", "--seq-length", "8"]
    sizes += ["--train-tokens", "64", "--train-batch-size", "4", "--micro-batch-size", "4", "--ar-ssm-max-rank", "4", "--htt-rank", "1"]
    assert main(["train", *sizes, "--out-dir", "trained", "--model", reference]) == 2
    error = capsys.readouterr().err
    assert "SystemExit: 0 (users_module.py, line" in error.splitlines()[-1]


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
