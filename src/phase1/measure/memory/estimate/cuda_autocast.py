"""Make fake CPU tensors take the memory that the same program takes on CUDA."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from phase1.measure.memory.estimate.fake_tensors import QuickFakeMode

# Functions that CUDA's autocast runs in float32 and the CPU's leaves alone (ATen/autocast_mode.h, AT_FORALL_FP32).
_CUDA_FLOAT32 = frozenset(
    [
        "acos", "asin", "cosh", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan", "pow",
        "softplus", "layer_norm", "group_norm", "logsumexp", "norm", "renorm", "cosine_similarity", "dist", "cdist",
    ]
)  # fmt: skip
# Functions that it runs with dtype=float32 instead: they read half precision and cast inside (AT_FORALL_FP32_SET_OPT_DTYPE).
_CUDA_FLOAT32_DTYPE = frozenset(["prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"])
_CHANGED = _CUDA_FLOAT32 | _CUDA_FLOAT32_DTYPE | {"rms_norm", "scaled_dot_product_attention", "backward"}
_RMS_NORM_IN_FLOAT32 = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 12)  # left alone before
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def imitated_cuda() -> Iterator[None]:
    """Within the block, new CPU tensors have sizes but no contents, and operators make the same intermediates as on CUDA.

    Fake CUDA tensors would be simpler; without a CUDA driver they fail in the backward pass.
    """
    with ExitStack() as stack:
        if gc.isenabled():  # a collection scans all of PyTorch's objects, which takes longer than many operators
            gc.disable()
            stack.callback(gc.enable)
        for mode in (_Contents(), _CudaAutocast()):
            stack.enter_context(mode)
        yield


class _Contents(QuickFakeMode):
    """Answers the few questions a step asks about contents, as for a healthy one: tensors are equal, numbers are 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return super().__torch_dispatch__(func, types, args, kwargs)


class _CudaAutocast(TorchFunctionMode):
    """The float32 casts of CUDA's autocast, and its fused RMSNorm and masked attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.autograd.backward:
            return self._backward(args[0], kwargs.get("grad_tensors"))
        if name not in _CHANGED or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward([args[0]], [kwargs.get("gradient")])
        if torch.is_autocast_enabled("cpu") and args[0].dtype in _HALF:
            if name in _CUDA_FLOAT32 or (name == "rms_norm" and _RMS_NORM_IN_FLOAT32):
                args = (args[0].float(), *args[1:])
            elif name in _CUDA_FLOAT32_DTYPE:
                kwargs = {"dtype": torch.float32} | kwargs
        if name == "rms_norm":
            return _fused_rms_norm(*args, **kwargs)
        if name == "scaled_dot_product_attention" and _takes_fused_kernel(*args, **kwargs):
            return _masked_attention(*args, **kwargs)
        if name in ("softmax", "log_softmax") and args[0].dtype in _HALF and kwargs.get("dtype") == torch.float32:
            y: Tensor = _SoftmaxToFloat.apply(args[0])
            return y
        return func(*args, **kwargs)

    def _backward(self, ends: Sequence[Tensor], gradients: Sequence[Tensor | None] | None = None) -> None:
        """`torch.autograd.backward` with this mode on, for what is recomputed: a mode is off while it handles a function."""
        with self:
            given = zip(ends, gradients or [None] * len(ends), strict=True)
            seeds = tuple(torch.ones_like(end) if gradient is None else gradient for end, gradient in given)
            torch.autograd.graph._engine_run_backward(tuple(ends), seeds, False, False, (), True, True)


def _fused_rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    y: Tensor = _FusedRMSNorm.apply(x, weight, len(normalized_shape))
    return y


class _FusedRMSNorm(torch.autograd.Function):
    """Shapes and saved tensors of aten._fused_rms_norm: the input, the weight and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[: x.ndim - dims], dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, _ = ctx.saved_tensors
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        return d_x, None if weight is None else torch.empty_like(weight), None


def _takes_fused_kernel(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> bool:
    """Whether CUDA would have a fused kernel where the CPU has none: with a mask, unless only products are allowed."""
    cuda = torch.backends.cuda
    return attn_mask is not None and (cuda.cudnn_sdp_enabled() or cuda.mem_efficient_sdp_enabled())


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    # convert_boolean_attn_mask in ATen/native/transformers/attention.cpp; heads share it, so it is not expanded over them
    bias = torch.empty_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
    y: Tensor = _FusedAttention.apply(q, k, v, bias)
    return y


class _FusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of aten._scaled_dot_product_cudnn_attention: its operands and one number per query.

    The memory-efficient kernel, which cards below 9.0 take, saves the same, its numbers per query in multiples of 32.
    Source: run_cudnn_SDP_fprop and run_cudnn_SDP_bprop in ATen/native/cudnn/MHA.cpp.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        B, H, T, _ = q.shape
        y = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)  # in the order of q, which is (B, T, H, ·) in this model
        ctx.save_for_backward(q, k, v, bias, y, q.new_empty(B, H, T, 1, dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.empty_like(q, dtype=torch.float32)  # dQ is summed in it
        return *gradients, None


class _SoftmaxToFloat(torch.autograd.Function):
    """Shapes and saved tensors of aten._softmax and aten._log_softmax with half_to_float: no float32 copy of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x, dtype=torch.float32)
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.empty_like(y, dtype=ctx.dtype)
