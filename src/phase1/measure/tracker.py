"""Follow every live tensor storage through a training step: what the bytes of its peak are made of."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Part = Literal["parameters", "buffers", "gradients", "optimizer_state", "activations", "logits_loss", "temporary"]
PARTS: tuple[Part, ...] = (
    "parameters", "buffers", "gradients", "optimizer_state", "activations", "logits_loss", "temporary",
)  # fmt: skip
BLOCK_BYTES = 512  # the CUDA allocator hands out multiples of this
_NEXT_PHASE = {"start": "forward", "forward": "backward", "backward": "optimizer", "optimizer": "idle"}


@dataclass
class _Block:
    size: int
    part: Part
    alive: Any  # weak reference to the storage; its callback is how we learn of the end


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at one instant, and what they were."""

    total: int
    parts: dict[Part, int]


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that live on one type of device, real tensors or fake ones.

    A storage is counted once, however many views share it, from the operator that returned it until it is freed,
    in multiples of 512 bytes. What an operator allocates and frees inside itself is not seen. A storage made in the
    forward phase is an activation, in a later phase a temporary (recomputed activations too); with a last dimension of
    `vocab_size` it is logits_loss. `label` says better, for what is a parameter, a gradient or optimizer state.
    `mark` is the callback of `train_step` with one micro batch.
    """

    def __init__(self, vocab_size: int, device_type: str) -> None:
        super().__init__()
        self.vocab_size, self.device_type = vocab_size, device_type
        self.phase = "idle"
        self.peaks: dict[str, Peak] = {}
        self._blocks: dict[int, _Block] = {}
        self._parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._total = 0

    @property
    def live(self) -> Peak:
        """What is alive now."""
        return Peak(self._total, dict(self._parts))

    @property
    def peak(self) -> Peak:
        """The highest of the phases of the last step."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    def mark(self, name: str) -> None:
        """Begin the phase after `name`, and forget its peak in the step before."""
        self.phase = _NEXT_PHASE[name]
        if self.phase != "idle":
            self.peaks[self.phase] = self.live

    def label(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Count the storages of `tensors` as `part` from now on; those not seen before are added."""
        for tensor in tensors:
            block = self._see(tensor)
            if block is not None:
                self._parts[block.part] -= block.size
                self._parts[part] += block.size
                block.part = part

    def label_gradients(self, model: torch.nn.Module) -> None:
        """Count a gradient as one from the moment it is accumulated into its parameter."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.label([parameter.grad], "gradients")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, (tuple, list)):
            for item in tree_iter(out):
                if isinstance(item, Tensor):
                    self._see(item)
        return out

    def _see(self, tensor: Tensor) -> _Block | None:
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the C++ storage, one for all its views
        block = self._blocks.get(key)
        if block is None:
            size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
            block = _Block(size, self._part_of(tensor), weakref.ref(storage, partial(self._freed, key)))
            self._blocks[key] = block
            self._total += size
            self._parts[block.part] += size
            if self.phase != "idle" and self._total > self.peaks[self.phase].total:
                self.peaks[self.phase] = self.live
        return block

    def _part_of(self, tensor: Tensor) -> Part:
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size:
            return "logits_loss"
        return "activations" if self.phase == "forward" else "temporary"

    def _freed(self, key: int, _: Any) -> None:
        block = self._blocks.pop(key)
        self._total -= block.size
        self._parts[block.part] -= block.size
