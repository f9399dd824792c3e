"""Proof of the kernels on the card they are about to run on: some compilers have broken such kernels without a word."""

import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from phase1.files import atomic_write
from phase1.ops.ar_ssm.reference import Parameters, ar_ssm_reference

LENGTH, HEADS, HIDDEN = 130, 2, 16  # several chunks and stretches, and a part of one
LIMIT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Relative error of each result and gradient: rounding stays far below, a wrong product is near 1."""


def proven(device: torch.device, R: int, P: int, fixed: int, window: int, dtype: torch.dtype) -> bool:
    """Whether results and gradients of `fused_ar_ssm` on `device` are those of `ar_ssm_reference` in float64.

    Checked once for a card, PyTorch, Triton and source of the kernels; the answer is kept in the cache folder. A failure is
    said in one line and the kernels are not used.
    """
    return _proven(torch.cuda.current_device() if device.index is None else device.index, R, P, fixed, window, dtype)


@cache
def _proven(index: int, R: int, P: int, fixed: int, window: int, dtype: torch.dtype) -> bool:
    import triton  # takes a second to import

    card = torch.cuda.get_device_properties(index)
    facts = [card.name, torch.__version__, triton.__version__, _source(), R, P, fixed, window, str(dtype)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    answers = _kept()
    if key not in answers:
        try:
            # in a thread of its own, out of all that the caller is in: autocast, inference mode, a block that is recomputed
            with ThreadPoolExecutor(1) as thread:
                worst = thread.submit(worst_error, torch.device("cuda", index), R, P, fixed, window, dtype).result()
        except torch.cuda.OutOfMemoryError:
            raise  # says nothing of the kernels
        except Exception as error:  # whatever a compiler or driver raises: the PyTorch form still runs
            answers[key] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            answers[key] = "right" if worst <= LIMIT[dtype] else f"relative error {worst:.2g}"
        _keep(answers)
    if answers[key] != "right":
        warnings.warn(
            f"kernels of AR-SSM fail their check on {card.name} with Triton {triton.__version__} (R={R}, P={P}, {dtype}): "
            f"{answers[key]}; its form in PyTorch runs in their place, slower",
            stacklevel=3,
        )
    return answers[key] == "right"


def worst_error(device: torch.device, R: int, P: int, fixed: int, window: int, dtype: torch.dtype) -> float:
    """Largest relative error of result, state and any gradient against float64, on random operands."""
    from phase1.ops.ar_ssm import fused_ar_ssm

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        generator = torch.Generator(device).manual_seed(0)  # of its own: the program's draw what they would have drawn
        proj, p = operands(2, LENGTH, HEADS, R, P, HIDDEN if fixed < R else 0, fixed, dtype, device, generator)
        got = _results(fused_ar_ssm, proj, p, window)
        exact = Parameters(*(None if q is None else q.double() for q in p))  # type: ignore[arg-type]
        want = _results(ar_ssm_reference, proj.double(), exact, window)
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(got, want, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


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


def _results(form, proj: Tensor, p: Parameters, window: int) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Result, state and all gradients of a sum with random weights."""
    out, state, gate = form(proj, p, window=window, memory=1000.0)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    total = (out * weights).sum() + gate.sum() + state.S.sum()
    learnt = [q for q in p if q is not None]
    return [out.detach(), state.S.detach(), *torch.autograd.grad(total, [proj, *learnt])]


def _source() -> str:
    """A fingerprint of the kernels."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "phase1" / "kernels.json"


def _kept() -> dict[str, str]:
    try:
        answers = json.loads(_cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # none yet, damaged, or a user without a home: check again
        return {}
    return answers if isinstance(answers, dict) else {}


def _keep(answers: dict[str, str]) -> None:
    with suppress(OSError, RuntimeError):  # a cache that cannot be written costs a check a run, no more
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(answers).encode())
