"""What of a model is compiled, and whether `torch.compile` works here, found out before a run depends on it."""

from typing import Any

import torch

from phase1.errors import Unavailable, reason
from phase1.trainable import Trainable

WHOLE = ("losses",)
IN_PIECES = ("outputs_of_piece", "loss_of_outputs", "state_after_piece")


def compile_losses(model: Trainable, pieces: bool, backend: Any = "inductor") -> None:
    """Compile what a step calls, of whole sequences or of pieces, at its first call, for the shapes of that call."""
    whole = model.config.model is None  # a user's model may hold what no compiler takes
    for name in IN_PIECES if pieces else WHOLE:
        setattr(model, name, torch.compile(getattr(model, name), fullgraph=whole, dynamic=False, backend=backend))


def require_compiler(device: torch.device) -> None:
    """Compile and run one small function on `device`. Raises Unavailable, one line, where that fails."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: torch.sin(x) * 2 + 1, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:
        needs = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        first = reason(RuntimeError(str(error).strip().partition("\n")[0]))
        got = f"{type(error).__name__}: {first}"
        raise Unavailable(f"--compile needs {needs} that works here; got {got}; leave it out") from error
