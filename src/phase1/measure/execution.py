"""How a step really runs: device, type of its products, attention kernel, compiled loss, CUDA graphs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phase1.ops.card import HAS_TRITON, runs_kernels
from phase1.ops.self_check import DISPROVEN, failed_kernels
from phase1.records.schema import Execution
from phase1.trainable import Trainable
from phase1.training.compiler import compile_losses
from phase1.training.graphed_pieces import GraphedPieces
from phase1.training.micro_batch import GraphedMicroBatch
from phase1.training.pieces import Pieces
from phase1.training.step import TrainState

PROBE_TOKENS = 64  # tokens of the forward pass that is watched; which kernels run does not depend on the length
INDUCTOR = "inductor"
LIMITS: dict[str, Any] = {
    "recompile_limit": 64,
    "accumulated_recompile_limit": 4096,
    "fail_on_recompile_limit_hit": True,
}
"""Recompilation limit of torch._dynamo. Three models at a few lengths reach its default, 8, and then silently run eagerly."""


class Compiler:
    """A backend of torch.compile, one per model: it counts how often what it has compiled is called."""

    def __init__(self, backend: str = INDUCTOR) -> None:
        self.backend, self.calls = backend, 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled = torch._dynamo.lookup_backend(self.backend)(graph, inputs)

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return compiled(*arguments)

        return run


def compile_loss(state: TrainState, backend: str = INDUCTOR) -> Compiler:
    """Compile the loss of the model, of whole sequences or of pieces, as `make_train_state` does.

    Returns the compiler that will have done it.
    """
    state.model.prove_kernels(state.dtype)  # in a compiled graph they cannot be checked
    compiler = Compiler(backend)
    compile_losses(state.model, isinstance(state.micro_batch, Pieces), compiler)
    return compiler


@contextmanager
def strict_compilation() -> Iterator[None]:
    """Within the block, a model that would silently run eagerly after too many recompilations raises an error."""
    import torch._dynamo

    with torch._dynamo.config.patch(**{name: value for name, value in LIMITS.items() if hasattr(torch._dynamo.config, name)}):
        yield


def forget_compiled() -> None:
    """Drop what was compiled for another length: the models of the next one compile for themselves."""
    import torch._dynamo

    torch._dynamo.reset()


class _Watch(TorchDispatchMode):
    """The operators that run, and the types of what matrix products multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.types: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.names.add(name)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.types[str(args[-1].dtype).removeprefix("torch.")] += 1
        return func(*args, **(kwargs or {}))


def execution(state: TrainState, compiler: Compiler | None) -> Execution:
    """What `state` runs with, watched in a forward pass of a few tokens, and where that is not what was asked for.

    compiler: that of the loss, after a step of the model; None where it was not to be compiled.
    """
    device = next(state.model.parameters()).device
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=device)
    autocast = torch.autocast(device.type, state.dtype, enabled=state.dtype != torch.float32)
    with uncompiled(state.model), _Watch() as watch, autocast:
        state.model.loss(ids, ids)  # with its graph: kernels of attention differ where there is none
    precision = watch.types.most_common(1)[0][0] if watch.types else str(state.dtype).removeprefix("torch.")
    config, fused = state.model.config, any("scaled_dot_product" in name for name in watch.names)
    attends = fused if config.model is not None else config.mixer == "attention"
    attention = _attention(watch.names) if attends else None
    kernels = "triton" if runs_kernels(next(state.model.parameters())) else "torch"
    found = Execution(
        device=device.type,
        precision=precision,
        attention=attention,
        kernels=kernels,
        compiled=compiler is not None and compiler.calls > 0,
        cuda_graphs=isinstance(state.micro_batch, GraphedMicroBatch | GraphedPieces),
        piece_length=state.micro_batch.length if isinstance(state.micro_batch, Pieces) else None,
        optimizer=state.config.optimizer,
    )
    return found.model_copy(update={"otherwise": _otherwise(found, state, compiler)})


@contextmanager
def uncompiled(model: Trainable) -> Iterator[None]:
    """Within the block the loss runs uncompiled: a compiled one hides its operators, and would compile for one more shape."""
    compiled = vars(model).pop("losses", None)
    try:
        yield
    finally:
        if compiled is not None:
            model.losses = compiled  # type: ignore[method-assign]


def _attention(names: set[str]) -> str:
    """The kernel behind scaled_dot_product_attention."""
    for word, kernel in (("cudnn", "cudnn"), ("flash", "flash"), ("efficient", "efficient")):
        if any("scaled_dot_product" in name and word in name for name in names):
            return kernel
    return "math"


def _otherwise(found: Execution, state: TrainState, compiler: Compiler | None) -> list[str]:
    """Each way in which the step does not run as asked, as part of a sentence."""
    config, said = state.model.config, []
    if found.attention == "math" and config.attention == "fused":
        said.append("attention ran by matrix products that hold all T x T scores: no fused kernel takes this type and size")
    if config.attention == "math" and found.attention not in (None, "math"):
        said.append(f"attention ran by the {found.attention} kernel, not by matrix products")
    if found.precision != (asked := str(state.dtype).removeprefix("torch.")):
        said.append(f"matrix products ran in {found.precision}, not in {asked}")
    if found.device != state.device.type:
        said.append(f"the step ran on {found.device}, not on {state.device.type}")
    if compiler is not None and not found.compiled:
        said.append("what was compiled was not called")
    said += failed_kernels()
    if found.device == "cuda" and found.kernels == "torch" and not DISPROVEN:
        why = "this card does not run them" if HAS_TRITON else "pip install triton"
        said.append(f"PyTorch's operators ran, not the kernels: {why}")
    return said
