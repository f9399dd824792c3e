import sys
from types import ModuleType, SimpleNamespace

import pytest

from phase1.errors import Unavailable
from phase1.training.trackers import tracker

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


def test_trackio_gets_numbers_and_samples(tmp_path, monkeypatch):
    calls = []
    module = ModuleType("trackio")
    module.init = lambda **options: calls.append(options)
    module.log = lambda values, step: calls.append((values, step))
    module.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", module)
    t = tracker("trackio", tmp_path / "run", {"seed": 0})
    t.log(ROW)
    t.sample(3, "text")
    t.close()
    assert calls == [{"project": "phase1", "name": "run", "config": {"seed": 0}}, ({"loss": 1.5}, 3), ({"sample": "text"}, 3), "finished"]


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_missing_package_is_one_line_with_its_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable, match=rf"^--report-to {name} needs a package; run `pip install {name}`$"):
        tracker(name, tmp_path, {})
