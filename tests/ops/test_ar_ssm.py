"""The fused AR-SSM operator against its definition: compiled on a GPU, in Triton's interpreter without one (tests/conftest.py)."""

import warnings
from contextvars import ContextVar

import pytest
import torch

from phase1.ops.ar_ssm import Parameters, State, ar_ssm_reference, fused_ar_ssm, self_check

pytest.importorskip("triton")

from phase1.ops import self_check as checks
from phase1.ops.ar_ssm import fused, sizes, step
from phase1.ops.self_check import DISPROVEN

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # relative, of a whole tensor
# dt_bias and A_log: sums over all positions of differences of u·du and v·dv, which cancel to a tenth and less
OF_DECAYS = {torch.float32: 5e-4, torch.float16: 5e-2, torch.bfloat16: 0.3}
EVERYWHERE = [
    # B, T, H, R, P, N, fixed, window
    (1, 1, 2, 8, 16, 4, 2, 10),
    (1, 37, 2, 16, 16, 8, 4, 16),
    (2, 40, 1, 16, 32, 0, 16, 20),
    (1, 70, 1, 32, 48, 12, 0, 40),
]
ON_A_GPU = [
    (2, 203, 3, 32, 64, 64, 8, 64),
    (2, 203, 3, 64, 64, 64, 8, 64),
    (2, 203, 3, 128, 64, 64, 8, 64),
    (2, 203, 3, 32, 128, 128, 8, 64),
    (1, 4100, 8, 32, 64, 64, 8, 64),
    (64, 100, 8, 32, 64, 64, 8, 64),
    (1, 1000, 2, 16, 32, 24, 8, 200),
]
SIZES = EVERYWHERE + (ON_A_GPU if DEVICE.type == "cuda" else [])
NAMES = ("proj", *Parameters._fields)


def double(p):
    return Parameters(*(None if q is None else q.detach().double().requires_grad_() for q in p))


def past_state(B, H, R, P, window, rows, dtype):
    conv = torch.randn(B, 3, H * (P + 2 * R), device=DEVICE).to(dtype)
    k, x = (torch.randn(B, H, rows, n, device=DEVICE).to(dtype) for n in (R, P))
    return State(1000, *(t.requires_grad_() for t in (conv, torch.randn(B, H, R, P, device=DEVICE), k, x)))


def compare(size, dtype, rows=None, strided=False):
    """Result, states and every gradient, against the definition in float64."""
    B, T, H, R, P, N, fixed, window = size
    torch.manual_seed(1 if T == 1000 else T)  # 1000 draws a u of nearly no length, whose gradient is any number
    proj, p = self_check.operands(B, T, H, R, P, N, fixed, dtype, DEVICE)
    if strided:
        proj = torch.cat([proj, proj], -1).detach()[..., : proj.shape[-1]].requires_grad_()
    state = None if rows is None else past_state(B, H, R, P, window, rows, dtype)
    exact = None if state is None else State(1000, *(t.detach().double().requires_grad_() for t in state[1:]))
    wide, q = proj.detach().double().requires_grad_(), double(p)
    got = flat(fused_ar_ssm(proj, p, window=window, memory=1000.0, state=state))
    want = flat(ar_ssm_reference(wide, q, window=window, memory=1000.0, state=exact))
    draws = [[torch.randn_like(t) for t in want] for _ in range(4)]  # of d_out and d_states; the first one is compared
    leaves = [proj, *(t for t in p if t is not None), *([] if state is None else state[1:])]
    exact_leaves = [wide, *(t for t in q if t is not None), *([] if exact is None else exact[1:])]
    of_got = torch.autograd.grad(sum((t * w.to(t.dtype)).sum() for t, w in zip(got, draws[0])), leaves)
    rounded = [[w.to(t.dtype).double() for t, w in zip(got, weights)] for weights in draws]
    drawn = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(want, weights)), exact_leaves, retain_graph=True)
        for weights in rounded
    ]
    of_want, usual = drawn[0], [(sum(g.square().sum() for g in gradients) / len(drawn)).sqrt() for gradients in zip(*drawn)]
    names = [name for name, t in zip(NAMES, (proj, *p)) if t is not None] + ["conv", "S", "k", "x"] * (state is not None)
    sizes = [*(t.norm() for t in want), *usual]  # a gradient that is one sum over all positions may happen to be near 0
    for name, a, b, size in zip(["out", "gate", "conv'", "S'", "k'", "x'", *names], [*got, *of_got], [*want, *of_want], sizes):
        limit = (OF_DECAYS if name in ("dt_bias", "A_log") else TOLERANCE)[dtype]
        least = 0.1 if T == 1 and name in ("q_scale", "A_log") else 1e-4  # of one position alone their gradients are 0
        error = (a.double() - b).norm() / size.clamp(min=least * b.numel() ** 0.5)
        assert error <= limit, (name, float(error))


def flat(result):
    out, state, gate = result
    return [out, gate, *state[1:]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_result_and_gradients_are_those_of_the_definition(size):
    compare(size, torch.float32)


@pytest.mark.parametrize("size", SIZES[1:2] if DEVICE.type == "cpu" else SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_differs_by_rounding(size, dtype):
    compare(size, dtype, strided=True)


@pytest.mark.parametrize("rows", [1, 9])
def test_a_state_goes_in_and_out_with_its_gradients(rows):
    compare((2, 19, 2, 8, 48, 12, 2, 10), torch.float32, rows)


def test_many_stretches_and_tiles_of_one_program_add_up(monkeypatch):
    monkeypatch.setattr(fused, "PROGRAMS", 2)
    monkeypatch.setattr(fused, "STRETCH", 16)
    monkeypatch.setattr(sizes, "PROGRAMS", ContextVar("programs", default=4))
    compare((1, 135, 1, 16, 16, 8, 4, 16), torch.float32, rows=15)


def test_a_reset_of_the_state_leaves_no_rounding_behind():
    proj, p = self_check.operands(1, 200, 1, 16, 16, 8, 4, torch.float32, DEVICE)
    raw = 16 + 2 * 16 + 16  # the column of dt
    with torch.no_grad():
        proj[:, ::30, raw] += 1000.0  # exp(A_log) Δ of a thousand: everything is forgotten
    got = fused_ar_ssm(proj, p, window=16, memory=1000.0)[0]
    want = ar_ssm_reference(proj.double(), double(p), window=16, memory=1000.0)[0]
    assert (got.double() - want).norm() < 1e-5 * want.norm()


def test_a_later_position_changes_no_earlier_result_by_one_bit():
    proj, p = self_check.operands(1, 100, 2, 16, 16, 8, 4, torch.float32, DEVICE)
    before = fused_ar_ssm(proj, p, window=16, memory=1000.0)[0]
    with torch.no_grad():
        proj[:, 70] += 1
    after = fused_ar_ssm(proj, p, window=16, memory=1000.0)[0]
    assert torch.equal(after[:, :70], before[:, :70]) and not torch.equal(after[:, 70], before[:, 70])


def test_two_runs_are_equal_bit_by_bit_and_recomputation_gives_the_same():
    proj, p = self_check.operands(1, 20, 1, 16, 16, 8, 4, torch.float32, DEVICE)

    def gradients(recompute):
        def form(proj):
            return fused_ar_ssm(proj, p, window=16, memory=1000.0)[0]

        out = torch.utils.checkpoint.checkpoint(form, proj, use_reentrant=False) if recompute else form(proj)
        return torch.autograd.grad(out.square().sum(), [proj, *p])

    first = gradients(False)
    assert all(torch.equal(a, b) for again in (False, True) for a, b in zip(first, gradients(again)))


def test_the_operator_compiles_without_a_break():
    proj, p = self_check.operands(1, 20, 1, 16, 16, 8, 4, torch.float32, DEVICE)

    def form(proj):
        out, state, gate = fused_ar_ssm(proj, p, window=12, memory=1000.0)
        return out.square().sum() + gate.sum() + state.S.sum()

    compiled = torch.compile(form, fullgraph=True, backend="aot_eager", dynamic=False)
    for a, b in zip(torch.autograd.grad(form(proj), [proj, *p]), torch.autograd.grad(compiled(proj), [proj, *p])):
        torch.testing.assert_close(a, b)


class TestSelfCheck:
    @pytest.fixture(autouse=True)
    def a_card(self, monkeypatch, tmp_path, named_card):
        """Kernels that run where these tests do, and an empty cache."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(checks, "compile_together", lambda work: None)  # which would ask a second time on a GPU
        monkeypatch.setattr(self_check, "LENGTH", 20 if DEVICE.type == "cuda" else 5)  # the interpreter is slow
        monkeypatch.setattr(self_check, "HEADS", 1)
        check = self_check.worst_error
        monkeypatch.setattr(self_check, "worst_error", lambda device, *rest: self.calls.append(rest) or check(DEVICE, *rest))
        self.calls = []
        self_check._proven.cache_clear()
        yield
        self_check._proven.cache_clear()
        DISPROVEN.clear()

    def proven(self):
        self_check._proven.cache_clear()  # as in another process
        return self_check.proven(torch.device("cuda", 0), 8, 16, 2, 10, torch.float32)

    def test_kernels_that_are_right_are_checked_once(self):
        assert self.proven() and self.proven() and len(self.calls) == 1

    def test_a_fault_is_found_said_in_one_line_and_remembered(self, monkeypatch):
        right = fused.core_backward
        monkeypatch.setattr(
            fused, "core_backward", lambda *a, **k: (lambda g: g._replace(v=g.v * 0.5))(right(*a, **k))
        )
        for _ in range(2):
            with pytest.warns(UserWarning, match="kernels of AR-SSM fail their check on a card .*relative error.*PyTorch"):
                assert not self.proven()
        assert len(self.calls) == 1

    def test_a_fault_in_a_step_alone_is_found(self, monkeypatch):
        right = step.step_forward
        monkeypatch.setattr(step, "step_forward", lambda *a: (right(*a)[0] * 0.5, *right(*a)[1:]))
        with pytest.warns(UserWarning, match="relative error 0.5"):
            assert not self.proven()

    def test_what_a_compiler_raises_is_a_failure_too(self, monkeypatch):
        monkeypatch.setattr(fused, "core_forward", lambda *a, **k: 1 / 0)
        with pytest.warns(UserWarning, match="ZeroDivisionError"):
            assert not self.proven()

    def test_the_check_leaves_the_program_alone(self):
        before = torch.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert self.proven()
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_check_is_no_part_of_a_block_that_is_recomputed(self):
        def block(x):
            assert self_check.proven(torch.device("cuda", 0), 8, 16, 2, 10, torch.float32)
            return x.sin().sin()

        self_check._proven.cache_clear()
        x = torch.ones(3, requires_grad=True)
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor(1.0).sin().cos() * torch.tensor(1.0).cos() * torch.ones(3))

    def test_memory_that_runs_out_is_no_fault_of_the_kernels(self, monkeypatch):
        def full(*_, **__):
            raise torch.cuda.OutOfMemoryError("full")

        monkeypatch.setattr(fused, "core_forward", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            self.proven()
        monkeypatch.undo()

    def test_a_damaged_or_unwritable_cache_only_costs_a_check(self, tmp_path):
        file = tmp_path / "phase1" / "kernels.json"
        file.parent.mkdir()
        file.write_text("{")
        assert self.proven()
        file.unlink()
        file.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.proven()
