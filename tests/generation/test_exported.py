"""`phase1 generate` from a folder of `phase1 export`, without transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phase1.cli import main
from phase1.generation import load
from tests.generation.test_decoder import BYTES, checkpoint  # noqa: F401, a fixture
from tests.reports import assert_one_line


@pytest.fixture
def folder(checkpoint, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("export") / "model"
    assert main(["export", "--checkpoint", str(checkpoint), "--out-dir", str(out)]) == 0
    return out


def generate(folder, capfd, code=0):
    capfd.readouterr()
    flags = ["--prompt", "The cat", "--seed", "4", "--max-tokens", "12", "--temperature", "1.5"]
    assert main(["generate", "--checkpoint", str(folder), *flags]) == code
    return capfd.readouterr()


def test_an_exported_folder_says_what_its_checkpoint_says(folder, checkpoint, capfd):  # noqa: F811
    assert generate(folder, capfd).out == generate(checkpoint, capfd).out
    ours, theirs = load(folder), load(checkpoint)
    ids = BYTES.encode("a dog")
    assert torch.equal(ours.prefill(ids)[0], theirs.prefill(ids)[0]) and ours.trained_length == theirs.trained_length


def edited(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


DAMAGES = [
    (edited("config.json", lambda c: c.update(model_type="llama")), "got model_type 'llama'"),
    (edited("config.json", lambda c: c.pop("model_type")), "got model_type None"),
    (edited("config.json", lambda c: c.update(n_layers=10**9)), "export it again"),
    (edited("config.json", lambda c: c.update(model="os:getcwd")), "no file decides what code runs"),
    (edited("config.json", lambda c: c.update(d_model="64")), "export it again"),
    (edited("config.json", lambda c: c.update(phase1_tokenizer="0" * 64)), "must be that of the training"),
    (lambda f: (f / "config.json").write_text("{"), "export it again"),
    (lambda f: (f / "config.json").write_text("[]"), "got model_type None"),
    (lambda f: (f / "model.safetensors").unlink(), "export it again"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 20), "export it again"),
    (lambda f: (f / "tokenizer.json").unlink(), "must hold tokenizer.json"),
    (weights(lambda t: t["model.norm.weight"].fill_(torch.nan)), "is not finite"),
    (weights(lambda t: t["model.embedding.anchors"].fill_(10**6)), "export it again"),
    (weights(lambda t: t.pop("model.norm.weight")), "export it again"),
]  # fmt: skip


@pytest.mark.parametrize("damage, says", DAMAGES)
def test_a_folder_of_another_model_or_damaged_is_one_line(folder, damage, says, capfd):
    damage(folder)
    err = generate(folder, capfd, code=2).err
    assert_one_line(err)
    assert says in err


def test_a_checkpoint_beside_an_export_is_what_is_read(folder, checkpoint, capfd):  # noqa: F811
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text("{}")
    assert generate(folder, capfd).out.startswith("The cat")


def test_an_export_goes_into_no_folder_of_a_checkpoint(folder, checkpoint, capfd):  # noqa: F811
    other = shutil.copytree(checkpoint, folder.parent / "other")
    for source, out, says in (
        (checkpoint, checkpoint, "--out-dir must be another folder than --checkpoint"),
        (checkpoint, f"{checkpoint}/../{checkpoint.name}", "--out-dir must be another folder than --checkpoint"),
        (folder, folder, "--out-dir must be another folder than --checkpoint"),
        (checkpoint, other, "--out-dir must hold no checkpoint"),
    ):
        before = sorted(path.name for path in Path(out).iterdir())
        assert main(["export", "--checkpoint", str(source), "--out-dir", str(out)]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and says in err
        assert sorted(path.name for path in Path(out).iterdir()) == before
