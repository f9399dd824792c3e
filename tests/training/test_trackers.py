import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from phase1.cli import main
from phase1.errors import Unavailable
from phase1.records.metrics import METRICS
from phase1.training.trackers import tracker

TRACKERS = ["tensorboard", "wandb", "trackio"]
ROW = {"step": 3, "loss": 1.5, "val_loss": None}


def test_tensorboard_gets_numbers_and_samples(tmp_path, monkeypatch):
    calls = []
    writer = SimpleNamespace(
        add_scalar=lambda *a: calls.append(a), add_text=lambda *a: calls.append(a), close=lambda: calls.append("closed")
    )
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: calls.append(folder) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    t = tracker("tensorboard", tmp_path, {"seed": 0})
    t.log(ROW)
    t.sample(3, "text")
    t.close()
    assert calls == [str(tmp_path / "tensorboard"), ("settings", "    seed = 0"), ("loss", 1.5, 3), ("sample", "text", 3), "closed"]


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_numbers_and_samples(tmp_path, monkeypatch, name, offline):
    calls = []
    module = ModuleType(name)
    module.init = lambda **options: calls.append(options)
    module.log = lambda values, step: calls.append((values, step))
    module.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, name, module)
    settings = {"seed": 0, "offline": offline}
    t = tracker(name, tmp_path / "run", settings)
    t.log(ROW)
    t.sample(3, "text")
    t.close()
    own = {"dir": str(tmp_path / "run"), "mode": "offline" if offline else None} if name == "wandb" else {}
    first = {"project": "phase1", "name": "run", "config": settings} | own
    assert calls == [first, ({"loss": 1.5}, 3), ({"sample": "text"}, 3), "finished"]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line_with_its_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(Unavailable, match=rf"^--report-to {name} needs a package; run `pip install {name}`$"):
        tracker(name, tmp_path, {})


def train(folder, *flags):
    text = folder / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 40)
    return main([
        "train", "--dataset-name", str(text), "--cache-dir", str(folder / "cache"), "--vocab-size", "257", "--d-model", "16",
        "--n-layers", "1", "--n-heads", "2", "--ar-ssm-max-rank", "4", "--htt-dense-rows", "8", "--htt-groups", "8", "--seq-length", "8",
        "--train-tokens", "64", "--train-batch-size", "4", "--out-dir", str(folder / "run"), *flags,
    ])  # fmt: skip


def test_a_training_reports_to_those_that_are_asked_for_and_imports_no_other(tmp_path, monkeypatch):
    told = {}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.init = lambda name=name, **options: told.setdefault(name, [])
        module.log = lambda values, step, name=name: told["run"].append(step)
        module.finish = lambda: None
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    assert train(tmp_path, "--report-to", "wandb", "trackio") == 0
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert sorted(told["run"]) == sorted(2 * rows) and rows
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(tmp_path, "--out-dir", str(tmp_path / "alone")) == 0
    assert train(tmp_path, "--out-dir", str(tmp_path / "other"), "--report-to", "wandb") == 3
