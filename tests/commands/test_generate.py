import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._pytree import tree_iter

from phase1.cli import main
from phase1.commands import generate
from phase1.config import EngineShape
from phase1.device import device_type
from phase1.generation import load
from phase1.model import LanguageModel
from phase1.presets import PRESETS
from tests.generation.test_decoder import checkpoint, untrained  # noqa: F401, one is a fixture

COMMON = ["--max-tokens", "12", "--temperature", "1.5"]


@pytest.fixture
def run(checkpoint, capfd):  # noqa: F811
    def run(*flags):
        code = main(["generate", "--checkpoint", str(checkpoint), *COMMON, *flags])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_the_text_is_on_stdout_and_the_rest_on_stderr(run):
    code, out, err = run("--prompt", "The cat", "--seed", "4")
    assert code == 0 and out.startswith("The cat") and out.endswith("\n") and len(out) > 9
    assert "tokens/s" in err and "state" in err and "The cat" not in err


def test_what_is_said_has_the_bytes_of_the_state(run, checkpoint):  # noqa: F811
    decoder = load(checkpoint, device=device_type())
    _, state = decoder.prefill([decoder.tokenizer.end_of_text, *decoder.tokenizer.encode("The cat")])
    size = sum(part.nbytes for part in tree_iter(state) if torch.is_tensor(part))
    assert size > 100 and f"; state {size:,} bytes on {device_type()}\n" in run("--prompt", "The cat")[2]


def test_without_the_copy_head_the_model_is_the_rest_of_it(run, checkpoint, monkeypatch):  # noqa: F811
    used = []
    monkeypatch.setattr(generate, "_generate", lambda run, decoder, prompt: used.append(decoder))
    for flag in ("--no-copy-head", "--copy-head"):
        assert run("--prompt", "a", "--precision", "fp32", flag)[0] == 0
    without, whole = used
    plain = LanguageModel(replace(whole.model.config, copy_head=False)).to(whole.device)
    weights = whole.model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    ids = whole.tokenizer.encode("The cat sees the cat")
    with torch.no_grad():
        log_p = plain(torch.tensor([ids], device=whole.device))[0, -1].log_softmax(-1)
    torch.testing.assert_close(without.prefill(ids)[0], log_p, atol=1e-5, rtol=1e-5)
    assert (whole.prefill(ids)[0] - log_p).abs().max() > 0.01


def test_samples_are_the_same_whatever_their_number(run):
    one, three = run("--prompt", "a")[1], run("--prompt", "a", "--samples", "3")[1]
    assert three.startswith(one[:-1]) and three.count("\n----\n") == 2
    assert run("--prompt", "a", "--samples", "3")[1] == three != run("--prompt", "a", "--samples", "3", "--seed", "1")[1]


def test_prompts_come_from_a_file_and_from_standard_input(run, tmp_path, monkeypatch):
    path = tmp_path / "prompt"
    path.write_bytes("\ufeffé日\r\n".encode())  # a byte order mark is none of the text, as in training
    from_file = run("--prompt-file", str(path))
    monkeypatch.setattr("sys.stdin", type("stdin", (), {"buffer": io.BytesIO(path.read_bytes())}))
    assert run("--prompt-file", "-")[:2] == from_file[:2] == run("--prompt", "é日\r\n")[:2]
    assert from_file[1].startswith("é日\r\n")


@pytest.mark.parametrize(
    "content, says",
    [
        ("é日\n".encode() + b"a\xff", "got invalid start byte in line 2, byte 7 of the text"),
        ("é日".encode("utf-16"), "got UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_a_prompt_that_is_no_utf_8_is_refused_as_data_are(run, tmp_path, monkeypatch, content, says):
    path = tmp_path / "prompt"
    path.write_bytes(content)
    monkeypatch.setattr("sys.stdin", type("stdin", (), {"buffer": io.BytesIO(content)}))
    for given, name in ((str(path), path), ("-", "standard input")):
        code, out, err = run("--prompt-file", given)
        assert (code, out, err.count("\n")) == (2, "", 1) and f"--prompt-file must be UTF-8 text; {name}: {says}" in err


def test_a_prompt_longer_than_the_training_is_noted(run):
    assert "trained on texts of 8" in run("--prompt", "a" * 40)[2] and "trained on" not in run("--prompt", "a")[2]


def test_every_flag_changes_the_text(run):
    plain = run("--prompt", "a")[1]
    for flags in (["--temperature", "0"], ["--top-k", "1"], ["--top-p", "0.001"], ["--no-copy-head"], ["--precision", "bf16"]):
        changed = run("--prompt", "a", *flags)
        assert changed[0] == 0 and (changed[1] != plain or flags[0] in ("--no-copy-head", "--precision"))


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--prompt", "a", "--prompt-file", "b"], "leave one out"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--prompt-file", "/nowhere"], "--prompt-file"),
        (["--checkpoint", "/nowhere"], "no checkpoint in /nowhere"),
        (["--tokenizer", "/nowhere"], "tokenizer.json"),
        (["--tokenizer", "gpt2"], "leave --tokenizer out: the checkpoint has its own"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, flags, says):
    code, out, err = run(*flags)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


def program(checkpoint, *flags, **options):  # noqa: F811
    command = [
        sys.executable,
        "-m",
        "phase1",
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        "\x1b[31m日",
        "--no-copy-head",
        *flags,
    ]
    # a shell starts what it puts in the background with interrupts ignored
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}, **options
    )


def drain(terminal):
    with contextlib.suppress(OSError):  # the end: the other side has closed
        while os.read(terminal, 1 << 16):
            pass


def test_a_terminal_gets_no_control_characters_and_ctrl_c_ends_with_the_text_so_far(checkpoint):  # noqa: F811
    ours, theirs = pty.openpty()
    process = program(checkpoint, "--max-tokens", "1000000", "--temperature", "2", stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    out = b""
    while len(out) < 400:
        out += os.read(ours, 1000)
    reader = threading.Thread(target=drain, args=(ours,), daemon=True)
    reader.start()  # a terminal that nobody reads takes no more, and the program waits for it
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1].decode().splitlines()
    assert process.returncode == 130
    assert len(err) == 2 and err[1] == "phase1 generate: interrupted"  # after the note on the prompt
    assert b"\x1b" not in out and out.decode(errors="ignore").startswith("\N{REPLACEMENT CHARACTER}[31m日")


def test_a_pipe_that_closes_is_silent(checkpoint):  # noqa: F811
    process = program(checkpoint, "--max-tokens", "1000000", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(3)
    process.stdout.close()
    assert process.wait(timeout=30) == 141 and len(process.stderr.read().splitlines()) == 1  # the note on the prompt


def test_text_comes_as_it_is_made(checkpoint):  # noqa: F811
    process = program(
        checkpoint, "--max-tokens", "100000", "--temperature", "2", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    began = time.monotonic()
    os.read(process.stdout.fileno(), 100)
    assert process.poll() is None and time.monotonic() - began < 60
    process.kill()
    process.communicate()


def test_the_model_that_make_validate_trains_writes_within_3_seconds_of_its_start(tmp_path):
    sizes = PRESETS["smoke"]["perplexity"]
    untrained(tmp_path, EngineShape(**{f.name: sizes[f.name] for f in fields(EngineShape) if f.name in sizes}))
    over = []
    while len(over) < 3 and min(over, default=1) > 0:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        limit = max(3, 1.5 * (time.monotonic() - began))  # of PyTorch alone, where other programs have the cores
        began = time.monotonic()
        process = program(tmp_path, "--copy-head", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        text = b""
        while len(text) < 20:  # the prompt, and some of what comes after it
            text += os.read(process.stdout.fileno(), 100)
        over.append(time.monotonic() - began - limit)
        text += process.communicate(timeout=60)[0]
        assert process.returncode == 0 and len(text) > 200
    assert min(over) <= 0, over


def test_the_compiler_which_takes_a_second_to_import_is_not_loaded(checkpoint):  # noqa: F811
    script = "import sys; from phase1.cli import main; main(sys.argv[1:]); assert 'torch._dynamo' not in sys.modules"
    command = [sys.executable, "-c", script, "generate", "--checkpoint", str(checkpoint), "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "closed, flags, code, out, err",
    [
        (">&-", "--prompt hi", 0, "", "tokens/s"),
        ("2>&-", "--prompt hi", 0, "hi", ""),
        (">&- 2>&- <&-", "--prompt hi", 0, "", ""),
        ("<&-", "--prompt-file -", 2, "", "--prompt-file - must have a standard input; got a closed one"),
        (">&-", "--prompt hi --top-k 0", 2, "", "--top-k must be"),
    ],
)
def test_closed_streams_are_silent(checkpoint, closed, flags, code, out, err):  # noqa: F811
    """What is printed to them goes nowhere, and into no file that has got their number."""
    command = f'"{sys.executable}" -m phase1 generate --checkpoint "{checkpoint}" --max-tokens 2 {flags} {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == code and done.stdout.startswith(out) and err in done.stderr, done
    assert "Traceback" not in done.stderr and (out != "") == (done.stdout != "") and (err != "") == (done.stderr != "")


@pytest.mark.parametrize("command", ["doctor", "tables --help", "--help"])
def test_no_command_minds_a_closed_output(command):
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -m phase1 {command} >&-'], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
