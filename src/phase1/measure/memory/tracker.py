"""Follow every tensor storage through a training step: what is allocated when, for what, and by which module."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phase1.measure.memory.trace import MemoryBlock, Part, Trace

_NEXT_PHASE = {"start": "forward", "forward": "backward", "backward": "optimizer", "optimizer": "idle"}


class OperatorMemory(Protocol):
    """The memory that an operator allocates and does not return, which a tracker cannot see."""

    def before(self, func: Any, phase: str) -> int:
        """Bytes that `func`, about to run, allocates and never frees; called before every operator of a step."""
        ...

    def after(self, func: Any, args: Any) -> tuple[int, int | None]:
        """Bytes that `func` used besides its results and freed; and by how much all blocks exceed the requests, if known."""
        ...


@dataclass
class _Alive:
    index: int
    storage: Any  # weak reference; its callback is how we learn of the end


class MemoryTracker(TorchDispatchMode):
    """Records the storages that live on one type of device, real tensors or fake ones, as a `Trace` of the last step.

    A storage is recorded once, however many views share it, from the operator that returned it until it is freed. One
    made in the forward phase is an activation, in a later phase temporary (recomputed activations too); with a last
    dimension of `vocab_size` it is logits_loss. `label` says better. `mark` is the callback of `train_step` with one
    micro batch. The backward pass sums gradients in place where it would without a tracker (`_sums_in_place`).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it is on; PyTorch's guard against that takes longer than the operators

    def __init__(self, vocab_size: int, device_type: str, operator_memory: OperatorMemory | None = None) -> None:
        super().__init__()
        self.vocab_size, self.device_type, self.operator_memory = vocab_size, device_type, operator_memory
        self.phase = "idle"
        self.trace = Trace()
        self._alive: dict[int, _Alive] = {}  # by the address of the C++ storage, one for all its views
        self._modules: list[str] = []  # whose forward is running, outermost first
        self._hooks: list[Any] = []
        self._sole_owner = _sole_owner_counts(device_type if device_type != "cuda" or torch.cuda.is_available() else "cpu")

    def __exit__(self, *args: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*args)

    def mark(self, name: str) -> None:
        """Begin the phase after `name`; "start" begins a new trace. Communication is part of the optimizer's phase."""
        if name == "communication":
            return
        self.phase = _NEXT_PHASE[name]
        if name == "start":
            self.trace.resident, self.trace.events, self.trace.begins, self.trace.rounding = self.live(), [], {}, []
        if self.phase != "idle":
            self.trace.begins[self.phase] = len(self.trace.events)

    def live(self) -> list[int]:
        """The blocks that are alive, oldest first."""
        return sorted(alive.index for alive in self._alive.values())

    def label(self, tensors: Iterable[Tensor], part: Part, module: str) -> list[int]:
        """Record the storages of `tensors` as `part` of `module`, from their beginning on; their blocks."""
        found = []
        for tensor in tensors:
            index = self._see(tensor)
            if index is not None:
                self.trace.blocks[index].part, self.trace.blocks[index].module = part, module
                found.append(index)
        return found

    def watch(self, model: nn.Module) -> None:
        """Label the parameters and buffers of `model`, its gradients as they are made, and note whose forward is running."""
        for name, module in model.named_modules():
            if name and name == site_of(f"{name}."):
                self._hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
                self._hooks.append(module.register_forward_hook(partial(self._leave, name), always_call=True))
        for name, parameter in model.named_parameters():
            self.label([parameter], "parameters", site_of(name))
            if parameter.requires_grad:
                hook = partial(self._accumulated, site_of(name))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        for name, buffer in model.named_buffers():
            self.label([buffer], "buffers", site_of(name))

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._modules.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        while self._modules and self._modules.pop() != name:  # one that raised, as recomputation does when it has enough
            pass

    def _accumulated(self, module: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.label([parameter.grad], "gradients", module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most calls are this question, which C++ asks of fake tensors
            return args[0].fake_device
        with torch._C.DisableTorchFunction():  # modes for functions are about those of the model, not about sizes
            return self._follow(func, args, kwargs or {})

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        operators = self.operator_memory if self.phase != "idle" else None
        if operators is not None and (kept := operators.before(func, self.phase)):
            self.trace.events.append(self._block(kept, "workspace"))
        in_place = func is torch.ops.aten.add.Tensor and self._sums_in_place(args)
        out = torch.ops.aten.add_.Tensor(*args, **kwargs) if in_place else func(*args, **kwargs)
        for item in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(item, Tensor):
                self._see(item)
        if operators is not None:
            scratch, rounding = operators.after(func, args)
            if scratch > 0:
                index = self._block(scratch, "temporary")
                self.trace.events += [index, ~index]
            if rounding is not None:
                self.trace.rounding.append((len(self.trace.events), rounding))
        return out

    def _sums_in_place(self, args: Any) -> bool:
        """Whether autograd, summing two gradients of one tensor, would write the sum over the first.

        It does so if nothing else owns the first and no dispatch mode is on (`accumulate` in
        torch/csrc/autograd/input_buffer.cpp). This tracker is such a mode, so it must sum in place itself, or the
        tracked step would take more memory than the real one.
        """
        if self.phase != "backward" or torch.is_grad_enabled():
            return False
        first, second = args[0], args[1]
        if not isinstance(second, Tensor) or (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        return _owners(first) == self._sole_owner and _is_dense(first)

    def _see(self, tensor: Tensor) -> int | None:
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        alive = self._alive.get(key)
        if alive is None:
            index = self._block(storage.nbytes(), self._part_of(tensor))
            alive = self._alive[key] = _Alive(index, weakref.ref(storage, partial(self._freed, key)))
            self.trace.events.append(index)
        return alive.index

    def _block(self, size: int, part: Part) -> int:
        self.trace.blocks.append(MemoryBlock(size, part, self._modules[-1] if self._modules else f"({self.phase})"))
        return len(self.trace.blocks) - 1

    def _part_of(self, tensor: Tensor) -> Part:
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size:
            return "logits_loss"
        return "activations" if self.phase == "forward" else "temporary"

    def _freed(self, key: int, _: Any) -> None:
        """Record a free. Consecutive frees are sorted by age, because the order of destruction differs from run to run."""
        events, end = self.trace.events, ~self._alive.pop(key).index
        first, place = max(self.trace.begins.values(), default=0), len(self.trace.events)
        # go back past the frees of younger blocks (~index < 0 <= any birth), but not into a block born and freed at once
        while place > first and events[place - 1] < end and events[place - 2] != ~events[place - 1]:
            place -= 1
        events.insert(place, end)


def site_of(name: str) -> str:
    """The module to which a parameter is counted: "blocks.3.mixer" for one of a list of blocks, else the outermost."""
    path = name.split(".")[:-1]
    return ".".join(path[: 3 if len(path) > 1 and path[1].isdigit() else 1])


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _owners(tensor: Tensor) -> tuple[int, int]:
    """How many references there are to a tensor and to its storage, those of the caller included."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def _sole_owner_counts(device: str) -> tuple[int, int] | None:
    """The counts that `_owners` gives, inside a mode, for a gradient that autograd alone owns when it sums it with another."""
    counts: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor:
                counts.append(_owners(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True, device=device) * 1.0
        losses = (x * 2).sum(), (x * 3).sum()
    with Look():
        torch.autograd.backward(losses)
    return counts[0] if counts else None
