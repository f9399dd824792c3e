"""Proof of the kernels of AR-SSM: results and gradients against the definition in float64."""

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from phase1.ops.ar_ssm.reference import Parameters, State, ar_ssm_reference
from phase1.ops.self_check import passes, relative_error

LENGTH, HEADS, HIDDEN = 130, 2, 16  # several chunks and stretches, and a part of one
FAR = 1 << 20  # a position
WHOLE = 512  # positions of one stretch of 16 chunks, for which other kernels are compiled: those of most trainings


def proven(device: torch.device, R: int, P: int, fixed: int, window: int, dtype: torch.dtype) -> bool:
    """Whether results and gradients of `fused_ar_ssm`, and results of `ar_ssm_step`, are those of the definition in float64.

    Where they are not, the kernels are not used.
    """
    return _proven(torch.cuda.current_device() if device.index is None else device.index, R, P, fixed, window, dtype)


@cache
def _proven(index: int, R: int, P: int, fixed: int, window: int, dtype: torch.dtype) -> bool:
    default = "its form in PyTorch runs in their place"
    check = lambda: worst_error(torch.device("cuda", index), R, P, fixed, window, dtype)  # noqa: E731
    sizes = f"R={R}, P={P}, gate from {fixed}, window {window}, "
    return passes("AR-SSM", index, dtype, sizes, check, default)


def worst_error(device: torch.device, R: int, P: int, fixed: int, window: int, dtype: torch.dtype) -> float:
    """Largest relative error of result, state and any gradient against float64, on random operands."""
    from phase1.ops.ar_ssm import fused_ar_ssm
    from phase1.ops.ar_ssm.sizes import PROGRAMS

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        generator = torch.Generator(device).manual_seed(0)  # of its own: the program's draw what they would have drawn
        whole = WHOLE if device.type == "cuda" else LENGTH  # the interpreter is slow
        errors = []
        for T, programs, goes_on in ((LENGTH, PROGRAMS.get(), False), (LENGTH, PROGRAMS.get(), True), (whole, 1, False)):
            proj, p = operands(2, T, HEADS, R, P, HIDDEN if fixed < R else 0, fixed, dtype, device, generator)
            exact = Parameters(*(None if q is None else q.double() for q in p))  # type: ignore[arg-type]
            past = _past(proj, exact, window) if goes_on else None
            token = PROGRAMS.set(programs)
            try:
                got = _results(fused_ar_ssm, proj, p, window, past)
            finally:
                PROGRAMS.reset(token)
            past = None if past is None else _double(past)
            errors.append(relative_error(got, _results(ar_ssm_reference, proj.double(), exact, window, past)))
        errors += [error_of_step(device, R, P, fixed, window, dtype, graphed) for graphed in (False, True)]
    return max(errors)


@torch.no_grad()
def error_of_step(device: torch.device, R: int, P: int, fixed: int, window: int, dtype: torch.dtype, graphed: bool) -> float:
    """Relative error of one token: after a window half full, or `graphed`, after a full one and at a position in memory."""
    from phase1.ops.ar_ssm import ar_ssm_step

    generator = torch.Generator(device).manual_seed(0)
    proj, p = operands(2, 1, HEADS, R, P, HIDDEN if fixed < R else 0, fixed, dtype, device, generator)
    exact = Parameters(*(None if q is None else q.double() for q in p))  # type: ignore[arg-type]
    past = state_of(proj, p, window - 1 if graphed else window // 2, FAR, generator)
    given = past._replace(position=torch.tensor(FAR, device=device)) if graphed else past  # type: ignore[arg-type]
    out, state, gate = ar_ssm_step(proj, p, window=window, memory=1000.0, state=given)
    wanted, after, mean = ar_ssm_reference(proj.double(), exact, window=window, memory=1000.0, state=_double(past))
    moved = torch.as_tensor(state.position - FAR, device=device)
    return relative_error([out, gate, moved, *state[1:]], [wanted, mean, torch.ones_like(mean), *after[1:]])


def operands(
    B: int, T: int, H: int, R: int, P: int, N: int, fixed: int, dtype: torch.dtype, device: torch.device,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Parameters]:  # fmt: skip
    """A random projection and parameters of the sizes that a model starts with; all of them need gradients."""
    conv = H * (P + 2 * R)

    def draw(*shape: int, mean: float = 0.0, std: float = 1.0, to: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * std + mean).to(to).requires_grad_()

    gate = (draw(N, std=0.1), draw(R - fixed, N, std=0.3), draw(R - fixed, mean=1.0, std=0.1)) if N else (None, None, None)
    decay = (draw(H, mean=-3.0), draw(H), draw(H, mean=1.0, std=0.1))
    scales = (draw(H, R, mean=2.0, std=0.1), draw(H, P, mean=0.25, std=0.1), draw(H * P, mean=1.0, std=0.1))
    proj = draw(B, T, conv + H * P + H + N, std=0.7, to=dtype)
    return proj, Parameters(draw(4, conv, std=0.5), draw(conv, std=0.1), *decay, *scales, *gate)


def state_of(proj: Tensor, p: Parameters, past: int, position: int, generator: torch.Generator | None = None) -> State:
    """A random state at `position`, with `past` keys and values, for tokens such as `proj` (B, T, ·)."""
    (H, R), P, B = p.q_scale.shape, p.state_scale.shape[1], len(proj)
    shapes = ((B, 3, H * (P + 2 * R)), (B, H, R, P), (B, H, past, R), (B, H, past, P))
    conv, S, k, x = (torch.randn(shape, device=proj.device, generator=generator) for shape in shapes)
    return State(position, conv.to(proj.dtype), S, k.to(proj.dtype), x.to(proj.dtype))


def _past(proj: Tensor, exact: Parameters, window: int) -> State:
    """The state after some positions, from the definition."""
    with torch.no_grad():
        state = ar_ssm_reference(proj[:, :window].double(), exact, window=window, memory=1000.0)[1]
    half = [part.to(proj.dtype) for part in (state.conv, state.k, state.x)]
    return State(state.position, half[0], state.S.float(), half[1], half[2])


def _double(state: State) -> State:
    return State(state.position, *(part.double() for part in state[1:]))


def _results(form, proj: Tensor, p: Parameters, window: int, past: State | None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Result, state and all gradients of a sum with random weights."""
    given = [] if past is None else [part.detach().requires_grad_() for part in past[1:]]
    past = None if past is None else State(past.position, *given)
    out, state, gate = form(proj, p, window=window, memory=1000.0, state=past)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    total = (out * weights).sum() + gate.sum() + state.S.sum()
    learnt = [q for q in p if q is not None]
    return [out.detach(), state.S.detach(), *torch.autograd.grad(total, [proj, *learnt, *given])]
