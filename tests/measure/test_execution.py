"""What ran is seen, and what runs otherwise than asked is said."""

import pytest
import torch

from phase1.measure import execution as module
from phase1.measure.execution import compile_loss, execution, forget_compiled, strict_compilation
from phase1.measure.throughput import interleaved
from phase1.measure.throughput.interleaved import ThroughputPlan, measure_throughput
from phase1.measure.workload import make_workload, random_batch
from phase1.roster import ROLES, model_config
from phase1.runs import ThroughputRun
from phase1.training.step import train_step

SHAPE = ThroughputRun(
    vocab_size=300, d_model=32, n_layers=2, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=8,
    htt_rank=4, htt_dense_rows=64, htt_groups=16,
)  # fmt: skip


def state(role="baseline", **changes):
    return make_workload(model_config(role, SHAPE, **changes), "cpu")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation: dynamo alone, whose guards and limits are what matters here."""
    monkeypatch.setattr(interleaved, "compile_loss", lambda state: compile_loss(state, "eager"))
    forget_compiled()
    yield
    forget_compiled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU has its own kernel of attention")
def test_attention_type_and_device_are_those_of_the_step():
    assert (found := execution(state(), None)).attention == "flash" and found.otherwise == []
    assert (found.device, found.precision, found.kernels, found.compiled, found.cuda_graphs) == (
        "cpu",
        "float32",
        "torch",
        False,
        False,
    )
    assert execution(state("phase1"), None).attention is None
    math = execution(state(attention="math"), None)
    assert math.attention == "math" and math.otherwise == [], "as asked"


def test_kernels_that_failed_their_check_are_said(monkeypatch):
    monkeypatch.setitem(module.DISPROVEN, "AR-SSM", "relative error 1")
    says = "kernels of AR-SSM failed their check (relative error 1): PyTorch's operators ran"
    assert execution(state(), None).otherwise == [says]


@pytest.mark.parametrize("runs, has, says", [
    (True, True, []),
    (False, True, ["PyTorch's operators ran, not the kernels: this card does not run them"]),
    (False, False, ["PyTorch's operators ran, not the kernels: pip install triton"]),
])  # fmt: skip
def test_kernels_are_those_that_the_card_runs(monkeypatch, runs, has, says):
    monkeypatch.setattr(module, "runs_kernels", lambda tensor: runs)
    monkeypatch.setattr(module, "HAS_TRITON", has)
    one = state()
    assert (found := execution(one, None)).kernels == ("triton" if runs else "torch")
    assert module._otherwise(found.model_copy(update={"device": "cuda"}), one, None)[1:] == says  # the first: no GPU here


def test_attention_without_a_kernel_is_said(monkeypatch):
    one = state()
    for block in one.model.blocks:
        block.mixer.backends = [torch.nn.attention.SDPBackend.MATH]
    assert "T x T" in execution(one, None).otherwise[0]


def test_products_in_another_type_than_asked_are_said():
    one = state()
    one.dtype = torch.bfloat16
    one.model.double()  # autocast leaves float64 alone
    assert any("float64, not in bfloat16" in line for line in execution(one, None).otherwise)


def test_each_length_is_proven_with_the_first_weights(monkeypatch):
    """After steps on random tokens most of a gradient is rounding, which a proof could take for an error."""
    seen = []
    weights = lambda state: [parameter.detach().clone() for parameter in state.model.parameters()]  # noqa: E731
    monkeypatch.setattr(interleaved, "compile_loss", lambda state: compile_loss(state, "eager"))
    monkeypatch.setattr(interleaved, "prove_compiled", lambda state, batch: seen.append((weights(state), state)))
    forget_compiled()
    models = {"phase1": model_config("phase1", SHAPE)}
    measure_throughput(models, ThroughputPlan((8, 16, 24), 1, 1, 1, compiled=frozenset(models)), "cpu")
    forget_compiled()
    first, *others = (found for found, _ in seen)
    assert len(others) == 2 and all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(seen[0][1]), strict=True)), "nothing was trained"


def test_a_compiled_model_is_counted_and_one_that_is_not_is_said():
    one = state()
    compiler = compile_loss(one, "eager")
    assert execution(one, compiler).otherwise == ["what was compiled was not called"], "watching compiles nothing"
    train_step(one, [random_batch(300, 1, 16, "cpu")])
    assert compiler.calls == 1 and execution(one, compiler).compiled
    forget_compiled()


def test_more_shapes_than_dynamo_allows_are_an_error_and_not_an_eager_run(monkeypatch):
    monkeypatch.setitem(module.LIMITS, "recompile_limit", 2)
    one = state()
    compile_loss(one, "eager")
    with strict_compilation(), pytest.raises(Exception, match="(?i)limit"):
        for length in (8, 16, 24, 32, 40):
            train_step(one, [random_batch(300, 1, length, "cpu")])
    forget_compiled()


def test_every_model_compiles_at_every_length_beyond_the_limit_of_dynamo(traced):
    lengths = tuple(range(8, 8 * 5, 8))
    models = {role: model_config(role, SHAPE) for role in ROLES}
    plan = ThroughputPlan(lengths, 1, 1, 1, compiled=frozenset(models))
    assert len(models) * len(lengths) > torch._dynamo.config.recompile_limit
    for role, contender in measure_throughput(models, plan, "cpu").items():
        assert [m.status for m in contender.measurements] == ["ok"] * len(lengths), role
        assert all(m.ran.compiled for m in contender.measurements), role


def test_without_compilation_the_record_says_so():
    models = {role: model_config(role, SHAPE) for role in ("baseline_fast", "phase1")}
    contenders = measure_throughput(models, ThroughputPlan((8,), 1, 1, 1), "cpu")
    assert not any(m.ran.compiled for contender in contenders.values() for m in contender.measurements)


def test_a_model_that_ran_eagerly_are_an_error_of_the_case(monkeypatch):
    class Nothing:
        calls = 0

    monkeypatch.setattr(interleaved, "compile_loss", lambda model: Nothing())
    models = {"phase1": model_config("phase1", SHAPE)}
    (m,) = measure_throughput(models, ThroughputPlan((8,), 1, 1, 1, compiled=frozenset(models)), "cpu")["phase1"].measurements
    assert m.status == "error" and "ran eagerly" in m.detail
