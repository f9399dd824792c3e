"""benchmarks/launches.py: neighbours of the usual launches, and no time for one that is wrong or refused."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from phase1.ops.ar_ssm import core
from phase1.ops.ar_ssm.core import Launch, launches_for

NAMES = ("launches", "ar_ssm")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import launches

    yield launches
    for name in NAMES:
        sys.modules.pop(name, None)


def test_the_usual_launch_comes_first_and_each_is_tried_once(bench):
    usual = Launch(32, 16, 2, 3)
    found = list(bench.variants(usual, keys=True))
    assert found[0] == usual and len(set(found)) == len(found)
    assert {Launch(64, 16, 4, 3), Launch(16, 16, 1, 3), Launch(32, 32, 2, 3), Launch(32, 16, 8, 3)} <= set(found)
    assert all(one.keys == 16 for one in bench.variants(usual, keys=False))


def test_every_kernel_of_the_core_has_a_name_that_it_is_timed_by(bench):
    assert set(bench.KERNELS) == set(vars(launches_for(32, 64, torch.float16))) - {"state"}
    assert all(hasattr(core.kernels, kernel) for kernel in bench.KERNELS.values())


@pytest.mark.parametrize("factor, note", [(1.0, ""), (1.1, "wrong"), (float("nan"), "wrong")])
def test_a_wrong_gradient_has_no_time(bench, monkeypatch, factor, note):
    exact = [torch.ones(3, dtype=torch.float64)]
    monkeypatch.setattr(bench, "gradients", lambda *sizes: [factor * exact[0]])
    monkeypatch.setattr(bench, "times", lambda *sizes: {"forward_kernel": 5.0})
    found = bench.measured("forward_kernel", (), exact)
    assert (found["microseconds"], found["note"]) == (None if note else 5.0, note)
    assert "µs" in bench.line({"kernel": "forward", **vars(Launch(32, 32, 2, 2)), "usual": True} | found)


def test_what_the_compiler_refuses_is_said(bench, monkeypatch):
    def refuses(*sizes):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(bench, "gradients", refuses)
    found = bench.measured("forward_kernel", (), [])
    assert found["microseconds"] is None and found["note"] == "RuntimeError: out of resource: shared memory"


def test_the_core_runs_as_it_is_told(bench):
    usual = launches_for(32, 64, torch.float16)
    with bench.using(usual):
        assert core.launches_for(8, 16, torch.float32) is usual
    assert core.launches_for is launches_for
