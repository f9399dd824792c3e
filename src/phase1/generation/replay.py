"""One step of decoding as a CUDA graph: launched at once, in memory that stays the same."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phase1.layers.attention import AttentionState
from phase1.layers.copy_head import CopyState
from phase1.training.micro_batch import WARMUP_RUNS, beside

Advance = Callable[[Tensor, list[Any]], tuple[Tensor, list[Any]]]


class GraphedStep:
    """`advance` for one token (B, 1), launched as a graph once the state has the same shapes before and after a step.

    A returned state is overwritten by the next call, so only the newest one, or one of `advance`, can go on. Until the windows
    of the mixers are full, `advance` runs eagerly. The state of the copy head is padded at the first call, with positions that
    have no weight.
    """

    def __init__(self, advance: Advance, copy_window: int) -> None:
        self.advance, self.copy_window = advance, copy_window
        self._replay: Callable[[], None] | None = None
        self._ids: Tensor | None = None
        self._state: list[Any] = []  # what the graph reads and writes
        self._newest: list[Any] | None = None
        self._log_p: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, ids: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """As `advance`. Raises ValueError for a state of an earlier call than the last, which is no more."""
        if state is not self._newest:
            if any(given is own for given, own in zip(state, self._state)):
                raise ValueError("of a graph the newest state must go on; got an older one, overwritten; leave out cuda_graphs")
            state = static(state, self.copy_window)
            if self._replay is None or _shapes(state) != _shapes(self._state):
                log_p, after = self.advance(ids, state)
                after = static(after, self.copy_window)
                if _shapes(after) == _shapes(state):
                    self._capture(ids, state)
                return log_p, after
            _copy(self._state, state)
        assert self._replay is not None and self._ids is not None and self._log_p is not None
        self._ids.copy_(ids)
        self._replay()
        self._newest = list(self._state)
        return self._log_p, self._newest

    def _capture(self, ids: Tensor, state: list[Any]) -> None:
        self._ids = ids.clone()
        self._state = [layer._make(_clone(part) for part in layer) for layer in state]
        given = self._ids, self._state
        warm_up(lambda: self.advance(*given))

        def step() -> Tensor:
            log_p, after = self.advance(*given)
            _copy(self._state, after)
            return log_p

        self._replay, self._log_p = captured(step, warm=True)


def warm_up(step: Callable[[], Any]) -> None:
    """Run `step` a few times on another stream, as a capture requires."""
    with beside():
        for _ in range(WARMUP_RUNS):
            step()


@torch.inference_mode()
def captured(step: Callable[[], Any], warm: bool = False) -> tuple[Callable[[], None], Any]:
    """A function that launches `step` as one graph, and the results of `step`: tensors that each launch overwrites."""
    if not warm:
        warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def launch() -> None:
        assert step is not None  # keeps alive what it reads, and so does the graph, which does not by itself
        graph.replay()

    return launch, result


def again(advance: Advance, ids: Tensor, state: list[Any], copy_window: int | None) -> Callable[[], object]:
    """A function that takes `ids` after the same state at every call; for a graph, with the window of its copy head.

    Keys and values are written in place, as in a text that goes on, where only one token in many makes room for more.
    """
    later = advance(ids, state)[1]
    state = [a.in_place(b) if isinstance(a, AttentionState) else a for a, b in zip(state, later, strict=True)]
    if copy_window is not None:
        state = static(state, copy_window)

    def step() -> object:
        for layer in state:
            if isinstance(layer, AttentionState):
                layer.forget_later()
        return advance(ids, state)

    return step


def static(state: list[Any], copy_window: int) -> list[Any]:
    """An equivalent of `state` for a graph: positions are tensors, and the copy head's state is padded to its full window."""
    return [_static(layer, copy_window) for layer in state]


def _static(layer: Any, copy_window: int) -> Any:
    if isinstance(layer, CopyState):
        return layer.padded(copy_window, 0)  # an id that can be looked up
    if isinstance(getattr(layer, "position", None), int):
        return layer._replace(position=torch.tensor(layer.position, device=layer.k.device))
    return layer


def _shapes(state: list[Any]) -> list[Any]:
    return [part.shape if isinstance(part, Tensor) else None for layer in state for part in layer]


def _clone(part: Any) -> Any:
    return part.clone(memory_format=torch.contiguous_format) if isinstance(part, Tensor) else part


def _copy(to: list[Any], state: list[Any]) -> None:
    """One launch for all tensors of a type, where the copies are laid out as the originals."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for mine, given in zip(to, state, strict=True):
        for old, new in zip(mine, given, strict=True):
            if isinstance(old, Tensor):
                olds, news = groups[old.dtype, old.stride() == new.stride()]
                olds.append(old)
                news.append(new)
    for olds, news in groups.values():
        torch._foreach_copy_(olds, news)
