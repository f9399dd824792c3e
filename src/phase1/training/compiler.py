"""Whether `torch.compile` works here, found out before a run depends on it."""

import torch

from phase1.errors import Unavailable, reason


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
