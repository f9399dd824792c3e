"""benchmarks/sequence_ops.py: a wrong gradient has no time, a row that raises or hangs costs itself alone, definitions agree."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def ops(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import sequence_ops

    yield sequence_ops
    for name in ("sequence_ops", "sequence_rows"):
        sys.modules.pop(name, None)


def row_of(ops, name):
    return next(row for row in ops.rows() if row.name == name)


def prepared(ops, row, T=400, B=2):
    torch.manual_seed(0)
    return ops.prepared(row, ops.Size(B, T, 8), "cpu", torch.float32)


@pytest.mark.parametrize("name", ["phase1 far, PyTorch", "phase1 window, PyTorch", "sdpa math"])
def test_a_right_row_is_timed(ops, name):
    result, steps = prepared(ops, row_of(ops, name))
    assert result["status"] == "ok" and result["worst_error"] < 1e-5
    times = ops.timed({name: steps}, 2, "cpu")[name]
    assert times["forward_ms"] > 0 and times["both_ms"] > 0


class Wrong(torch.autograd.Function):
    """Right results, and a gradient that is wrong at one position."""

    @staticmethod
    def forward(ctx, x, at):
        ctx.at = at
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g[:, ctx.at] *= -1
        return g, None


@pytest.mark.parametrize("at", [3, 390], ids=["at the beginning", "at the end"])
@pytest.mark.parametrize("name", ["v", "q", "g"])
def test_a_wrong_gradient_fails_wherever_it_is_wrong(ops, at, name):
    from dataclasses import replace

    row = row_of(ops, "phase1 far, PyTorch")
    right = row.load()
    wrong = replace(row, load=lambda: lambda x: right(x | {name: Wrong.apply(x[name], at)}))
    result, steps = prepared(ops, wrong)
    assert steps is None and result["status"] == "FAIL" and result["worst"].startswith(f"d{name}")


def test_a_leak_of_gradients_from_the_future_fails(ops):
    from dataclasses import replace

    row = row_of(ops, "phase1 far, PyTorch")
    right = row.load()
    wrong = replace(row, load=lambda: lambda x: right(x) + 0.2 * right(x).sum(1, keepdim=True), values=None)
    assert prepared(ops, wrong)[0]["status"] == "FAIL"


def test_rows_that_raise_are_refused_and_missing_packages_skipped(ops):
    from dataclasses import replace

    row = row_of(ops, "phase1 far, PyTorch")

    def raising():
        raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results")

    assert prepared(ops, replace(row, load=raising))[0]["status"] == "refused"
    missing = replace(row, load=lambda: __import__("no_such_package"))
    assert prepared(ops, missing)[0]["status"] == "skipped"
    large = prepared(ops, row_of(ops, "sdpa math"), T=400)[0]
    assert large["status"] == "ok"
    assert "GB" in row_of(ops, "sdpa math").refuse(ops.Size(1, 131072, 32))


def test_definitions_agree_where_one_is_a_case_of_the_other(ops):
    import sequence_rows as rows

    size = rows.Size(1, 40, 4)
    x = {name: tensor.detach().double() for name, tensor in rows.delta_operands(size, "cpu", torch.float32).items()}
    spread = x | {"g": x["g"][..., None].expand(*x["g"].shape, 4)}
    assert torch.allclose(rows.define_delta(x), rows.define_delta(spread))
    assert torch.allclose(rows.define_gla(spread), rows.define_linear(x))
    assert torch.allclose(rows.define_attention(x, 10**6), rows.define_attention(x))
    dt = torch.rand(1, 40, rows.HEADS, dtype=torch.float64)
    ssd = {"x": x["v"], "dt": dt, "A": torch.zeros(rows.HEADS).double(), "B": x["k"], "C": x["q"]}
    assert torch.allclose(rows.define_ssd(ssd), rows.define_linear(x | {"v": x["v"] * dt[..., None], "g": 0 * x["g"]}))


def test_flex_attention_sees_the_window_that_the_definition_does(ops):
    """Its mask, and the blocks of it that its kernel visits, which the CPU's form does not look at."""
    import sequence_rows as rows

    size, T = rows.Size(1, 300, 16), 300
    for name, window in (("flex_attention window", rows.WINDOW), ("flex_attention", T)):
        row = row_of(ops, name)
        x = {name: tensor.detach() for name, tensor in row.operands(size, "cpu", torch.float32).items()}
        assert torch.allclose(row.load()(x), row.define(x), atol=1e-5)
        t = torch.arange(384)
        seen = (t[:, None] >= t) & (t[:, None] - t < window)
        blocks = seen.view(3, 128, 3, 128).any(3).any(1)
        assert torch.equal(rows.block_mask(T, None if window == T else window, "cpu").to_dense()[0, 0].bool(), blocks)


def test_a_process_that_crashes_or_hangs_costs_its_row_alone(ops, tmp_path, monkeypatch):
    """The parent, with a process that dies at one row, is silent at another, and does the rest."""
    worker = tmp_path / "worker.py"
    worker.write_text("""
import json, os, sys, time
say = lambda kind, **more: print(json.dumps({"kind": kind} | more), flush=True)
say("facts", facts={"device": "none", "copy_bytes_per_second": 1.0})
for job in json.loads(sys.stdin.read()):
    for name in job["rows"]:
        say("begin", row=name)
        if name == "sdpa flash": os._exit(9)
        if name == "sdpa cudnn": time.sleep(60)
    for name in job["rows"]:
        say("row", row={k: job[k] for k in "BTR"} | {"row": name, "status": "ok", "note": "", "worst_error": 0.0, "forward_ms": 1.0,
                                                     "both_ms": 2.0, "ideal_bytes": 1, "launch": "eager"})
    say("job done")
""")
    monkeypatch.setattr(ops, "__file__", str(worker))
    options = Namespace(sizes=["1x8", "1x16"], ranks=[32], rows=["sdpa", "flex"], precision="fp32", rounds=1, seconds=60.0,
                        row_seconds=1.5, out_dir=str(tmp_path), worker=False, plot_only=False)  # fmt: skip
    ops.measure(options, tmp_path / "sequence_ops.json")
    record = json.loads((tmp_path / "sequence_ops.json").read_text())
    found = {(row["T"], row["row"]): row["status"] for row in record["rows"]}
    assert found[8, "sdpa flash"] == found[16, "sdpa flash"] == "refused"
    assert found[8, "sdpa cudnn"] == "refused" and (16, "sdpa cudnn") not in found  # it would hang there too
    assert [found[T, name] for T in (8, 16) for name in ("sdpa math", "sdpa efficient", "flex_attention")] == ["ok"] * 6
    ops.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists() and len(ops.table(record)) == 1 + len(record["rows"])
