"""PyTorch's fake tensors made fast: the result of an operator is derived once and then remembered."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_VALUES = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format])
_aten = torch.ops.aten
_VIEWS = frozenset(
    [
        _aten.alias.default, _aten.as_strided.default, _aten.detach.default, _aten.expand.default, _aten.permute.default,
        _aten.select.int, _aten.slice.Tensor, _aten.squeeze.dim, _aten.t.default, _aten.transpose.int, _aten.unsqueeze.default,
        _aten.view.default,
    ]
)  # fmt: skip
_Recipe = Callable[[list[FakeTensor]], Any]


class QuickFakeMode(FakeTensorMode):
    """FakeTensorMode that remembers what an operator made of tensors of the same sizes, strides and types.

    A model repeats its blocks, and most operators of a step repeat one before. FakeTensorMode remembers too, but takes
    several times as long over it: it allows for symbolic sizes and much else that no step here has. The first time, and
    whatever is out of the ordinary, is left to it: all sizes are PyTorch's.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in it; the guard against that costs more than the operators

    def __init__(self) -> None:
        super().__init__()
        self.cache_enabled = False  # FakeTensorMode's own: what is here would be there too
        self._recipes: dict[Any, _Recipe] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        key = _key((func, *args, *kwargs.items()), tensors)
        recipe = self._recipes.get(key)
        if recipe is not None:
            return recipe(tensors)
        if key is not None and func in _VIEWS:
            out: Any = self._view_of(func, args, kwargs)
        else:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        if key is not None and key == _key((func, *args, *kwargs.items()), []):  # no argument has changed its sizes
            recipe = self._recipe(out, tensors)
            if recipe is not None:
                self._recipes[key] = recipe
        return out

    def _view_of(self, func: Any, args: Any, kwargs: Any) -> FakeTensor:
        """What FakeTensorMode makes of `func`, without its search for how: that takes ten times as long as a view does."""
        with in_kernel_invocation_manager(self):
            view = func(*args, **kwargs)
        return FakeTensor(self, view, args[0].fake_device)

    def _recipe(self, out: Any, tensors: list[FakeTensor]) -> _Recipe | None:
        """How to make such an `out` of other `tensors`; None for a result that is not of the usual kinds."""
        if isinstance(out, FakeTensor):
            return self._tensor_recipe(out, tensors)
        if type(out) in _VALUES:
            return lambda tensors: out
        if type(out) not in (tuple, list):
            return None
        kind, recipes = type(out), [self._recipe(item, tensors) for item in out]
        known = [recipe for recipe in recipes if recipe is not None]
        if len(known) < len(recipes) or not _apart(out, tensors):
            return None
        return lambda tensors: kind([recipe(tensors) for recipe in known])

    def _tensor_recipe(self, out: FakeTensor, tensors: list[FakeTensor]) -> _Recipe | None:
        for index, tensor in enumerate(tensors):
            if tensor is out:
                return lambda tensors: tensors[index]
        if out.constant is not None or out.requires_grad or out.dtype.is_complex:
            return None
        shape, stride, offset, dtype, device = out.shape, out.stride(), out.storage_offset(), out.dtype, out.fake_device
        storage = out.untyped_storage()
        for index, tensor in enumerate(tensors):
            if tensor.untyped_storage()._cdata == storage._cdata:

                def view(tensors: list[FakeTensor], index: int = index) -> FakeTensor:
                    empty = torch.empty(0, dtype=dtype, device="meta")
                    return FakeTensor(self, empty.set_(tensors[index].untyped_storage(), offset, shape, stride), device)

                return view

        def new(tensors: list[FakeTensor]) -> FakeTensor:
            return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

        return new if new([]).untyped_storage().nbytes() == storage.nbytes() else None


def _apart(results: Iterable[Any], tensors: list[FakeTensor]) -> bool:
    """Whether no two of `results` share a storage, other than one of `tensors`."""
    old = {tensor.untyped_storage()._cdata for tensor in tensors}
    made = [item.untyped_storage()._cdata for item in results if isinstance(item, FakeTensor)]
    new = [storage for storage in made if storage not in old]
    return len(set(new)) == len(new)


def _key(items: Iterable[Any], tensors: list[FakeTensor]) -> tuple[Any, ...] | None:
    """What a result depends on, or None if that is not all known; the tensors among `items` are added to `tensors`."""
    key: list[Any] = []
    for item in items:
        kind: Any = type(item)
        if kind is FakeTensor:
            if item.constant is not None or item.dtype.is_complex:
                return None
            tensors.append(item)
            key.append((item.shape, item.stride(), item.storage_offset(), item.dtype, item.fake_device))
        elif kind in _VALUES or kind is OpOverload:
            key.append((kind, item))  # 1, 1.0 and True are equal, and their results are not
        elif kind is tuple or kind is list:
            inner = _key(item, tensors)
            if inner is None:
                return None
            key.append(inner)
        else:
            return None
    same = [id(tensor) for tensor in tensors]
    if len(set(same)) < len(same):  # which are one and the same: `out` is one of two equal ones, or is both
        key.append(tuple(map(same.index, same)))
    return tuple(key)
