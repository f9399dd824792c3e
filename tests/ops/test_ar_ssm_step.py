"""One token of AR-SSM in its own kernels against the definition: on a GPU, or in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch

from phase1.ops.ar_ssm import Parameters, State, ar_ssm_reference, ar_ssm_step, self_check

pytest.importorskip("triton")

from phase1.ops.ar_ssm import step
from phase1.ops.self_check import LIMIT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative, of a whole tensor
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
FAR = 1_000_000_007
SIZES = [
    # B, H, R, P, N, fixed, window, past, position
    (1, 2, 8, 16, 4, 2, 10, 9, 9),  # a full window
    (1, 8, 32, 64, 64, 8, 64, 63, 5000),  # the default
    (3, 2, 12, 24, 70, 5, 7, 3, 3),  # no powers of two, and more than one block of hidden units
    (2, 3, 16, 16, 0, 16, 8, 0, 1),  # no rank gate, nothing in the window
    (1, 1, 16, 16, 8, 0, 1, 0, FAR),  # a window of this position alone
    (2, 1, 20, 48, 12, 0, 2, 1, FAR),
    (1, 1, 128, 128, 16, 8, 70, 68, 2**31 + 11),  # several blocks of keys
]


def exact(p):
    return Parameters(*(None if q is None else q.double() for q in p))


def operands(size, dtype, seed=0):
    """A projection, parameters and the state before the token."""
    B, H, R, P, N, fixed, _, past, position = size
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        proj, p = self_check.operands(B, 1, H, R, P, N, fixed, dtype, DEVICE, generator)
    return proj, p, self_check.state_of(proj, p, past, position, generator)


def flat(result):
    out, state, gate = result
    return {"out": out, "gate": gate, **dict(zip(["conv", "S", "k", "x"], state[1:]))}


def compare(size, dtype, in_memory=False, strided=False):
    proj, p, state = operands(size, dtype)
    window = size[6]
    if strided:
        proj = torch.cat([proj, proj], -1)[..., : proj.shape[-1]]
        state = state._replace(k=state.k.transpose(1, 2).contiguous().transpose(1, 2))
    wide = State(state.position, *(part.double() for part in state[1:]))
    given = state._replace(position=torch.tensor(state.position, device=DEVICE)) if in_memory else state
    with torch.inference_mode():
        found = ar_ssm_step(proj, p, window=window, memory=1000.0, state=given)
        wanted = ar_ssm_reference(proj.double(), exact(p), window=window, memory=1000.0, state=wide)
    assert int(found[1].position) == size[-1] + 1 and torch.is_tensor(found[1].position) == in_memory
    assert found[0].dtype == found[1].k.dtype == dtype and found[1].S.dtype == found[2].dtype == torch.float32
    for (name, a), b in zip(flat(found).items(), flat(wanted).values()):
        assert a.shape == b.shape, name
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm(), (name, float((a.double() - b).norm() / b.norm()))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_token_and_the_state_after_it_are_those_of_the_definition(size, in_memory):
    compare(size, torch.float32, in_memory)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_operands_of_any_layout_and_precision_differ_by_rounding(size, dtype):
    compare(size, dtype, strided=True)


def test_steps_one_after_the_other_are_the_whole_sequence():
    B, H, R, P, N, fixed, window, T = 2, 2, 8, 16, 4, 2, 6, 100 if DEVICE.type == "cuda" else 30
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.inference_mode():
        proj, p = self_check.operands(B, T, H, R, P, N, fixed, torch.float32, DEVICE, generator)
        shapes = ((B, 3, H * (P + 2 * R)), (B, H, R, P), (B, H, 0, R), (B, H, 0, P))
        state, found = State(0, *(proj.new_zeros(shape) for shape in shapes)), []
        for t in range(T):
            out, state, _ = ar_ssm_step(proj[:, t : t + 1], p, window=window, memory=1000.0, state=state)
            found.append(out)
        wanted, last, _ = ar_ssm_reference(proj.double(), exact(p), window=window, memory=1000.0)
    assert state.position == T
    for a, b in zip([torch.cat(found, 1), *state[1:]], [wanted, *last[1:]]):
        assert (a.double() - b).norm() <= TOLERANCE[torch.float32] * b.norm()


def test_a_step_leaves_the_state_that_it_was_given():
    proj, p, state = operands(SIZES[0], torch.float32)
    state = state._replace(position=torch.tensor(7, device=DEVICE))
    before = [part.clone() for part in state]
    with torch.inference_mode():
        ar_ssm_step(proj, p, window=10, memory=1000.0, state=state)
    assert all(torch.equal(a, b) for a, b in zip(state, before))


FAULTS = {
    "out": lambda out, state, gate: (out * 0.5, state, gate),
    "gate": lambda out, state, gate: (out, state, gate * 0.5),
    "position": lambda out, state, gate: (out, state._replace(position=state.position + 1), gate),
    "conv": lambda out, state, gate: (out, state._replace(conv=state.conv.roll(1, 1)), gate),
    "S": lambda out, state, gate: (out, state._replace(S=state.S.mT.reshape(state.S.shape)), gate),
    "k": lambda out, state, gate: (out, state._replace(k=state.k.roll(1, 2)), gate),
    "x": lambda out, state, gate: (out, state._replace(x=state.x.roll(1, 2)), gate),
}


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_check_finds_a_fault_in_any_result(monkeypatch, dtype, graphed):
    def error():
        return self_check.error_of_step(DEVICE, 8, 16, 2, 10, dtype, graphed)

    right = step.step_forward
    assert error() < 0.1 * LIMIT[dtype]
    for name, fault in FAULTS.items():
        monkeypatch.setattr(step, "step_forward", lambda *a, fault=fault: fault(*right(*a)))
        assert error() > LIMIT[dtype], name
