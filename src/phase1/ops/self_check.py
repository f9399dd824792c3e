"""Proof of kernels on the card they are about to run on: some compilers have broken such kernels without a word."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from phase1.files import atomic_write
from phase1.ops.compile_together import compile_together
from phase1.world import is_first

LIMIT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Relative error of each result and gradient: rounding stays far below, a wrong product is near 1."""
DISPROVEN: dict[str, str] = {}
"""Kernels that have failed their check in this process, and how."""
KERNELS = "copy head, groups, table, loss and positions"
LENGTH, WIDTH = 150, 64  # several tiles, and a part of one
WIDE, ANCHORS = 512, 6  # of a row of the table at the default sizes, for which other kernels are compiled


def _width(device: torch.device) -> int:
    """Of a row: on the CPU Triton's interpreter takes its time."""
    return WIDE if device.type == "cuda" else WIDTH


def failed_kernels() -> list[str]:
    """Each of DISPROVEN as part of a sentence."""
    return [f"kernels of {name} failed their check ({why}): PyTorch's operators ran" for name, why in DISPROVEN.items()]


def passes(kernels: str, index: int, dtype: torch.dtype, sizes: str, worst_error: Callable[[], float], default: str) -> bool:
    """Whether `worst_error` of these kernels is within the limit on GPU `index`.

    Asked once for a card, PyTorch, Triton, sizes and source of all kernels; the answer is kept in the cache folder. A failure
    is said in one line, and is in DISPROVEN.
    """
    import triton  # takes a second to import

    card = torch.cuda.get_device_properties(index)
    facts = [kernels, card.name, torch.__version__, triton.__version__, _source(), sizes, str(dtype)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    answers = _kept()
    if key not in answers:
        if is_first():
            print(f"phase1: kernels of {kernels} are compiled and checked, once on this card; up to a minute", file=sys.stderr)
        try:
            # in a thread of its own, out of all that the caller is in: autocast, inference mode, a block that is recomputed
            with ThreadPoolExecutor(1) as thread:
                with suppress(Exception):  # it spares time alone: what is wrong is found again
                    thread.submit(compile_together, worst_error).result()
                worst = thread.submit(worst_error).result()
        except torch.cuda.OutOfMemoryError:
            raise  # says nothing of the kernels
        except Exception as error:  # whatever a compiler or driver raises: the PyTorch form still runs
            answers[key] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            answers[key] = "right" if worst <= LIMIT[dtype] else f"relative error {worst:.2g}"
        _forget_workspaces()
        _keep(answers)
    if answers[key] == "right":
        return True
    DISPROVEN[kernels] = answers[key]
    of = f"{card.name} with Triton {triton.__version__} ({sizes}{dtype})"
    warnings.warn(f"kernels of {kernels} fail their check on {of}: {answers[key]}; {default}, slower", stacklevel=4)
    return False


def _forget_workspaces() -> None:
    """Free those that cuBLAS has kept for the check's thread, which nobody would use again: 32 MiB on Hopper."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()


def relative_error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest of all tensors; infinite where one is no number."""
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, wanted, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the KERNELS on `device` compute what their PyTorch forms do in float64."""
    return _proven(torch.cuda.current_device() if device.index is None else device.index, dtype)


@cache
def _proven(index: int, dtype: torch.dtype) -> bool:
    default = "the forms in PyTorch run in their place"
    check = lambda: worst_error(torch.device("cuda", index), dtype)  # noqa: E731
    return passes(KERNELS, index, dtype, "", check, default)


def worst_error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of the kernels' results and gradients, against their PyTorch forms in float64."""
    from phase1.ops.anchored_table import kernel as table_kernel
    from phase1.ops.anchored_table import levels as bags
    from phase1.ops.cross_entropy import kernel as row_kernel
    from phase1.ops.cross_entropy.rows import softmax_rows_reference
    from phase1.ops.group_nll import gathered
    from phase1.ops.group_nll import kernel as group_kernel
    from phase1.ops.pointer import blocked
    from phase1.ops.pointer import kernel as pointer_kernel
    from phase1.ops.rotary import kernel as angle_kernel
    from phase1.ops.rotary import rotary_angles_reference

    rows, angles = row_kernel.softmax_rows_kernel, angle_kernel.rotary_angles_kernel
    exact = torch.float64
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return max(
            relative_error(_pointer(pointer_kernel, device, dtype, dtype), _pointer(blocked, device, dtype, exact)),
            relative_error(_groups(group_kernel, device, dtype, dtype), _groups(gathered, device, dtype, exact)),
            relative_error(_table(table_kernel, device, dtype, dtype), _table(bags, device, dtype, exact)),
            relative_error(_rows(rows, device, dtype, dtype), _rows(softmax_rows_reference, device, dtype, exact)),
            relative_error(_angles(angles, device, dtype, dtype), _angles(rotary_angles_reference, device, dtype, exact)),
        )


class _Draw:
    """The same random numbers at every call, of a generator of their own, rounded to `dtype` and then in type `to`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> None:
        self.device, self.dtype, self.to = device, dtype, to
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, wide: bool = False) -> Tensor:
        """`wide`: float32 where the type is a half one."""
        kind = torch.float32 if wide else self.dtype
        to = torch.promote_types(self.to, kind)
        return torch.randn(*shape, generator=self.generator).to(self.device, kind).to(to)

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator).to(self.device)


def _pointer(form, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
    draw = _Draw(device, dtype, to)
    q, k = draw(2, LENGTH, WIDTH), draw(2, LENGTH, WIDTH)
    bias, d_result = draw(2, LENGTH, wide=True), draw(2, LENGTH, wide=True)
    ids, targets, window = draw.ids(5, 2, LENGTH), draw.ids(5, 2, LENGTH), LENGTH // 2
    total, copied = form.normalizers(q, k, bias, ids, targets, window, 0)
    return total, copied.exp(), *form.gradients(q, k, bias, ids, targets, total, copied, d_result, window, 0)


def _groups(form, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
    draw, size, n, width = _Draw(device, dtype, to), 67, 150, _width(device)
    states, rows, bias, d_nll = draw(LENGTH, width), draw(n, width) / width**0.5, draw(n, wide=True), draw(LENGTH, wide=True)
    targets = draw.ids(n, LENGTH)
    found, order = (targets // size).sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(-(-n // size) + 1, device=device))
    nll, normalizer = form.losses(states, rows, bias, targets, order, starts, size)
    return nll, *form.gradients(states, rows, bias, targets, order, starts, normalizer, d_nll, size)


def _table(form, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
    from phase1.ops.anchored_table.inverse import inverse_index

    draw, levels, k, width = _Draw(device, dtype, to), [10, 40, LENGTH], ANCHORS, _width(device)
    own = [draw(10, width, wide=True), draw(30, width // 4, wide=True), draw(LENGTH - 40, width)]
    weights, anchors = draw(LENGTH - 10, k, wide=True) / k, draw.ids(10, LENGTH - 10, k)
    table, d_table = form.table(own, weights, anchors, levels, to), draw(LENGTH, width)
    d_own, d_weights = form.gradients(d_table, table, own[:2], weights, anchors, inverse_index(anchors, levels), levels)
    return table, *d_own, d_weights


def _rows(form, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
    draw, n, V = _Draw(device, dtype, to), 3, 17_000  # columns that need no mask, and others
    logits, bias, log_p = draw(n, V), draw(V, wide=True), draw(n, wide=True)
    odds = draw(n, wide=True) - 10  # as probable as the target
    target, weights = draw.ids(V, n), torch.ones(n, dtype=torch.bool, device=device)
    form(logits, bias, target, log_p, weights, odds)
    return log_p, logits


def _angles(form, device: torch.device, dtype: torch.dtype, to: torch.dtype) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
    found: Sequence[Tensor] = form(_Draw(device, dtype, to)(1), LENGTH, WIDTH // 2, 1 << 16)
    return found


@cache
def _source() -> str:
    """A fingerprint of all kernels, as some use functions of others."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
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
