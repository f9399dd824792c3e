"""Nothing in a file runs, leaves the output folder, or reaches a terminal, a spreadsheet or a report that it should not."""

import ast
import getpass
import json
import socket
from pathlib import Path

import pytest

import phase1
from phase1.cli import main
from phase1.commands import perplexity
from phase1.data import load_corpus
from phase1.errors import reason
from phase1.machine.environment import current_command, environment, settings
from phase1.plots import plot_losses, plot_memory, plot_perplexity, plot_throughput
from phase1.records import session
from phase1.records.schema import FILES
from phase1.runs import PerplexityRun
from phase1.text import without_private
from phase1.training.checkpoint import INDEX, load_model, read_index, resume, save_checkpoint
from phase1.training.step import train_step
from tests.reports import all_reports, contents, make_tables, write_all
from tests.training.test_step import as_tensors, batch_at, state

PACKAGE = Path(phase1.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parents[1] / "scripts").glob("*.py")])
HOSTILE = "\x1b[31m<b>=1+1|$x$_\n\u202e\\input{x}"

# Nothing from a file runs ---------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "codeop", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "torch.hub.load", "np.load", "numpy.load", "pd.read_pickle", "os.system", "os.popen"}


def dangers(source: str) -> list[str]:
    """What in a source could run the content of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            safe = name == "torch.load" and isinstance(flag := options.get("weights_only"), ast.Constant) and flag.value is True
            found += [name] if name in CALLS | METHODS and not safe else []
            found += [option for option in ("trust_remote_code", "shell", "allow_pickle") if option in options]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_runs_the_content_of_a_file(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import os, yaml", "eval(text)", "exec(text)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "load_dataset(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)", "__import__(name)", "os.system(text)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_there_for(line):
    assert dangers(line)


def test_the_search_leaves_alone_what_is_safe():
    assert dangers("model.eval(); torch.load(path, weights_only=True); re.compile(x); torch.compile(block)") == []


# Names from data stay in the output folder ---------------------------------------------------------------------------

ESCAPES = [
    "../x",
    "/etc/passwd",
    "../../model-00000001.safetensors",
    "a/b",
    "..",
    "model-00000001.safetensors/../x",
    "",
    "\x00",
]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("part", ["model", "training"])
def test_a_checkpoint_names_tensor_files_of_its_own_folder_alone(tmp_path, name, part):
    saved = state()
    train_step(saved, as_tensors(batch_at(0), 4))
    save_checkpoint(tmp_path / "a" / "b", saved, {})
    for escape in {name, str(tmp_path / "model-00000001.safetensors")}:
        index = read_index(tmp_path / "a" / "b")
        index["files"][part] = escape
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / INDEX).write_text(json.dumps(index))
        for read in (load_model, lambda folder: resume(folder, saved)):
            with pytest.raises(ValueError, match="is not a checkpoint of format 1") as error:
                read(tmp_path / "c")
            assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("key", ["../../x", "/x", "phase1/../../x", "a\x1b[2J", "<b>", "=1+1", "con.", "A" * 65])
def test_a_result_file_with_a_model_key_that_is_no_name_is_refused_and_none_of_it_is_written(tmp_path, capsys, kind, key):
    results = write_all(tmp_path / "in")
    content = json.loads((results / FILES[kind]).read_text())
    content["results"][key] = content["results"]["baseline"]
    (results / FILES[kind]).write_text(json.dumps(content))
    before = {*tmp_path.rglob("*")}
    assert make_tables(results) == 2
    error = capsys.readouterr().err
    assert "result is called" in error and error[:-1].isprintable()
    written = {*tmp_path.rglob("*")} - before - {tmp_path / "out"}
    assert written and all(path.parent == tmp_path / "out" for path in written)  # tables of the other files
    assert not any(path.name.startswith(kind) or key.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize("name", ["../../x", "/nowhere/x", "..", "a/../../b", "x\n\x1b[2J/y"])
def test_the_name_of_a_data_set_makes_no_file_outside_cache_and_output(tmp_path, capsys, name):
    arguments = ["--offline", "--dataset-name", name, "--tokenizer", "bpe"]
    folders = ["--out-dir", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["perplexity", *arguments, *folders, "--checkpoint-dir", str(tmp_path / "checkpoints")]) in (2, 3)
    assert capsys.readouterr().err[:-1].isprintable()
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_with_a_hostile_name_is_read_and_its_name_is_only_a_text(tmp_path):
    folder = tmp_path / "<b>=1+1\x1b[31m"
    folder.mkdir()
    (folder / "valid.txt").write_text("a b c\n")
    (folder / "train.txt").write_text("a b c\n" * 20)
    run = PerplexityRun(dataset_name=str(folder), tokenizer="bpe", cache_dir=str(tmp_path / "cache"))
    corpus = load_corpus(run, vocab_size=300)
    assert corpus.name == folder.name
    assert all(path.name.isprintable() and "<b>" not in path.name for path in (tmp_path / "cache").rglob("*"))


# Text from data is only text ------------------------------------------------------------------------------------------


def hostile(value):
    """`value` with every text that the schema leaves free made hostile."""
    return value.model_copy(
        update={
            "command": HOSTILE,
            "environment": value.environment | {"gpu": HOSTILE, "cpu": HOSTILE},
            "checks": [check.model_copy(update={"detail": HOSTILE}) for check in value.checks],
            "run": value.run | {"batch_size": HOSTILE, "seq_length": HOSTILE, "precision": HOSTILE},
            "results": {
                key: r.model_copy(update={"config_id": HOSTILE, "detail": HOSTILE}) for key, r in value.results.items()
            },
        }
    )


def test_hostile_text_in_results_is_neutral_in_every_table_and_on_the_console(tmp_path, capsys):
    results = tmp_path / "in"
    results.mkdir()
    for kind, report in all_reports().items():
        (results / FILES[kind]).write_text(json.dumps(hostile(report).model_dump()))
    assert make_tables(results) == 0
    assert main(["compare", str(results), str(write_all(tmp_path / "other")), "--fail-on", "peak:+1%"]) == 3  # other hardware
    printed = capsys.readouterr()
    for name, data in contents(tmp_path / "out").items():
        text = data.decode()
        assert "\x1b" not in text and "\u202e" not in text
        if name.endswith(".md"):
            assert "<b>" not in text.replace(r"\<b\>", "")
        elif name.endswith(".tex"):
            assert r"\input{" not in text and "$x$" not in text
        else:
            assert not any(cell.lstrip('"').startswith("=") for line in text.splitlines() for cell in line.split(","))
    for text in (printed.out, printed.err):
        assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("plot", [plot_memory, plot_throughput, plot_perplexity, plot_losses], ids=lambda plot: plot.__name__)
def test_hostile_text_is_neutral_in_the_titles_and_labels_of_plots(tmp_path, drawn, plot):
    kind = next((kind for kind in FILES if kind in plot.__name__), "perplexity")
    plot(hostile(all_reports()[kind]), tmp_path / "a.png")
    from matplotlib.text import Text

    texts = [artist.get_text() for artist in drawn[0].findobj(Text)]
    assert any("<b>=1+1" in text for text in texts)
    for line in (line for text in texts for line in text.split("\n")):
        assert line.isprintable() and "$x$" not in line.replace(r"\$", "")


@pytest.mark.parametrize(
    "argv",
    [
        ["compare", HOSTILE, HOSTILE], ["tables", "--results-dir", HOSTILE], ["perplexity", "--dataset-name", HOSTILE],
        ["perplexity", "--checkpoint", HOSTILE], ["memory", HOSTILE], ["memory", "--batch-size", HOSTILE], [HOSTILE],
        ["compare", "a", "b", "--fail-on", HOSTILE], ["perplexity", "--tokenizer", HOSTILE, "--dataset-name", "builtin"],
        ["perplexity", "--checkpoint", f"baseline={HOSTILE}"],
    ],
)  # fmt: skip
def test_an_error_line_is_printable_whatever_was_asked_for(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = main(argv)
    error = capsys.readouterr().err
    assert status in (2, 3) and error
    assert all(line.isprintable() for line in error.splitlines()), error


# Reports hold nothing private -----------------------------------------------------------------------------------------

SECRETS = [
    "hf_abcdefghijklmnopqrstuvwxyz123456",
    "ghp_abcdefghijklmnopqrstuvwxyz123456",
    "s3cr3t-password",
    "AKIAABCDEFGHIJKLMNOP",
]


@pytest.fixture
def poisoned(monkeypatch):
    """Secrets and names in every variable that programs keep them in."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, SECRETS[0])
    for name, value in {"HOME": "/home/poisoned-user", "USER": "poisoned-user", "LOGNAME": "poisoned-user"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HOSTNAME", "HOST", "COMPUTERNAME", "SLURM_NODELIST", "PS1", "SSH_CLIENT"):
        monkeypatch.setenv(name, "poisoned-host")
    monkeypatch.setattr(socket, "gethostname", lambda: "poisoned-host")
    monkeypatch.setattr("platform.node", lambda: "poisoned-host")
    return ("poisoned", *SECRETS)


def test_the_environment_block_takes_nothing_from_poisoned_variables(poisoned):
    text = json.dumps(environment())
    assert getpass.getuser() == "poisoned-user"
    assert not any(word in text for word in poisoned)


PRIVATE = [
    ("--dataset-name /home/ann/texts", "--dataset-name ~/texts"),
    ("https://ann:s3cr3t-password@example.org/x", "https://***@example.org/x"),
    ("https://example.org/x?token=s3cr3t-password&y=1", "https://example.org/x?token=***&y=1"),
    ("https://example.org/x?X-Amz-Signature=s3cr3t-password", "https://example.org/x?X-Amz-Signature=***"),
    ("/data/hf_abcdefghijklmnopqrstuvwxyz123456/x", "/data/***/x"),
    ("api_key=s3cr3t-password", "api_key=***"),
    ("AKIAABCDEFGHIJKLMNOP", "***"),
    ("ghp_abcdefghijklmnopqrstuvwxyz123456", "***"),
    ("baseline=results/a phase1_htt16_ar32=b tokenizer=bpe hf_home monkey=7", None),
]


@pytest.mark.parametrize("text, expected", PRIVATE)
def test_tokens_passwords_and_homes_are_replaced_and_all_else_is_left(text, expected):
    assert without_private(text) == (text if expected is None else expected)


@pytest.mark.parametrize("text", [text for text, expected in PRIVATE if expected])
def test_command_settings_and_messages_hold_nothing_private(monkeypatch, text):
    monkeypatch.setattr("sys.argv", ["phase1", "perplexity", "--dataset-name", text, "--out-dir", text])
    run = PerplexityRun(dataset_name=text, checkpoint=(f"baseline={text}", text), out_dir=text)
    kept = json.dumps([current_command(), settings(run), reason(RuntimeError(text)), perplexity.conditions(run)])
    assert not any(word in kept for word in ("ann", *SECRETS)), kept


def test_a_report_written_with_poisoned_variables_names_no_host_user_home_or_token(poisoned, tmp_path, monkeypatch):
    from tests.fake_runs import fake, run

    with monkeypatch.context() as patch:
        fake(patch, tmp_path / "log")
        patch.setattr(session, "environment", environment)
        monkeypatch.setattr(
            "sys.argv", ["/home/poisoned-user/bin/phase1", "memory", "--out-dir", f"/home/poisoned-user/{SECRETS[0]}"]
        )
        run("memory", tmp_path)
    text = (tmp_path / FILES["memory"]).read_text()
    assert not any(word in text for word in poisoned)
