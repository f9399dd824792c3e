"""Half-precision matrix products that accumulate into a float32 matrix."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


# An operator of its own, so that the estimate of memory, on tensors without contents, sees what a GPU allocates: nothing.
@torch.library.custom_op("phase1::add_product", mutates_args=("sums",))
def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a b, (m, n) += (m, k) (k, n); a and b may have less precision than `sums`."""
    if sums.dtype == a.dtype:
        sums.addmm_(a, b)
    elif a.is_cuda and _adds_in_float32(a.device.index, a.dtype):
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        sums += a @ b


@add_product.register_fake
def _(sums: Tensor, a: Tensor, b: Tensor) -> None:
    pass


@register_flop_formula(torch.ops.phase1.add_product)
def _(sums: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


@lru_cache
def _adds_in_float32(device: int, dtype: torch.dtype) -> bool:
    """Whether this PyTorch can add a product of `dtype` to float32 in place; tried once: versions before 2.10 refuse."""
    sums, ones = torch.full((16, 16), 0.1, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        out = torch.addmm(sums, ones, ones, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return out.data_ptr() == sums.data_ptr() and bool((sums == torch.tensor(0.1) + 16).all())
